"""What an audit found, as plain frozen data: what renderers read, and nothing that draws."""

import math
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from onsphere._torch.execution import OutputPicker, bare_name
from onsphere._torch.materialize import unwrapped
from onsphere.symmetry.claims import (
    DOUBTING,
    EFFECT_OF_DECAY,
    EFFECT_ON_PARTS,
    HIDING,
    Family,
    Kind,
    Leak,
    Limit,
    Rescaling,
    ScaleInvariance,
    ShiftFamily,
    Slices,
)
from onsphere.symmetry.exact.trace import Call, UnknownOp
from onsphere.symmetry.search.partial import Part
from onsphere.symmetry.search.shift import Shift
from onsphere.symmetry.subspaces.channel_kinds import Block
from onsphere.symmetry.subspaces.in_training import moved_in_training
from onsphere.symmetry.weight_decay import left_to_training, shrinkable, untrained


class ModelReference:
    """Says which model was audited as long as it lives; a copy or a pickle of it says nothing."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._reference = None if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        """Return the model; ``None`` where it is gone."""
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> tuple[type["ModelReference"], tuple[()]]:
        return ModelReference, ()


@dataclass(frozen=True)
class Inputs:
    """What a model was run on.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors to keep fixed.
        model: which model that was.
        others: further inputs on which its operations were followed; where shifts were found, those
            as well that reach all of it with other weights only.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: OutputPicker | None
    model: ModelReference = field(default_factory=ModelReference, repr=False)
    others: tuple[Call, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class AuditResult:
    """Which weights of a model live on spheres, and what else can change without effect.

    Args:
        model: name of the model's class.
        mode: ``"train"`` or ``"eval"``: the mode it was audited in.
        parameters: every parameter's name and shape, in the order of the model.
        spheres: weights, or sets of weights, whose scale does nothing, inert ones left out.
        rescalings: weights whose scales trade off against each other.
        shifts: directions in which a single weight can move.
        inert: parameters that cannot affect the output.
        leaks: how far the real eps breaks each symmetry.
        scale_symmetries: a basis of all scale symmetries: name -> exponent.
        exact_symmetries: a basis of those that the real eps does not break either.
        followers: buffers that only estimate (running statistics in training mode), and how they
            should move along; one entry per scale symmetry.
        unknown_ops: operations that the analysis did not understand and never claims through.
        taught_ops: operations that ran by a rule of the user's (``register_rule``).
        families: scale symmetries by row, column and channel: a line for any number of channels.
            Those of whole weights are sums of these, or stand in ``scale_symmetries`` alone.
        shift_families: weights that can move together: a bias and the one behind the next map, a
            vector that every norm behind it takes away; shifts of one weight are among them where
            operations show them.
        parts: intervals of weights that are on spheres, or inert, while the whole weight is not.
        unreached: parameters that this input did not reach (an expert nobody asked); no claim.
        certified: whether the claims were tested on numbers; not so for a model without memory.
        complete: whether the numeric search for further symmetries ran to its end.
        limits: what could not be seen or shown, where something could not.
        conditions: what was assumed of the inputs, in words: which others were tried, and what
            holds for those given only.
        note: how the model was built, where a reader must know (without memory, two layers of it).
        inputs: what the model was run on; not written to a file.
        embeddings_and_heads: embedding tables and the weights of output layers, which are kept off
            spheres by default; ``None`` in a file of an earlier version.
        frozen: parameters that did not train (``requires_grad`` is off) when this was audited.
        transposed: weights of transposed convolutions, whose second axis counts filters.
    """

    model: str
    mode: str
    parameters: Mapping[str, tuple[int, ...]]
    spheres: list[ScaleInvariance]
    rescalings: list[Rescaling]
    shifts: list[Shift]
    inert: list[str]
    leaks: list[Leak]
    scale_symmetries: list[dict[str, Fraction]]
    exact_symmetries: list[dict[str, Fraction]]
    followers: list[dict[str, Fraction]]
    unknown_ops: list[UnknownOp]
    unreached: list[str]
    certified: bool
    complete: bool
    parts: list[Part] = field(default_factory=list)
    families: list[Family] = field(default_factory=list)
    shift_families: list[ShiftFamily] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    conditions: list[str] = field(default_factory=list)
    note: str = ""
    inputs: Inputs | None = field(default=None, compare=False, repr=False)
    embeddings_and_heads: list[str] | None = None
    frozen: list[str] = field(default_factory=list)
    transposed: list[str] = field(default_factory=list)
    taught_ops: list[str] = field(default_factory=list)

    @cached_property
    def trained_symmetries(self) -> list[dict[str, Fraction]]:
        """A basis of the scale symmetries that leave alone what does not train.

        That is all of them where no buffer and no frozen weight takes part.
        """
        return left_to_training(self.scale_symmetries, self._untrained)

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """What is free about the scale of each parameter, as long as buffers and the frozen stay.

        Frozen are the weights that were so when this was audited.
        """
        alone = self.own_spheres()
        free, traded = self._freed
        moved = {n for v in self.scale_symmetries for n in v}
        hidden = self.unknown_ops or any(x.kind in HIDING for x in self.limits)
        doubted = {n for x in self.limits if x.kind in DOUBTING for n in x.names}

        def kind(name: str) -> Kind:
            if name in self.inert:
                return Kind.INERT
            if name in self.frozen:
                return Kind.FROZEN
            if name in self.unreached:
                return Kind.UNREACHED
            if name in alone:
                return Kind.SPHERE
            if name in free or name in traded:
                return Kind.SHARED if name in free else Kind.TRADED
            if hidden or name in doubted:
                return Kind.UNKNOWN
            return Kind.TIED if name in moved else Kind.FIXED

        return {n: kind(n) for n in self.parameters}

    @cached_property
    def _freed(self) -> tuple[set[str], set[str]]:
        """Weights that can shrink as they train while no other grows, and all that move at all.

        A bias that makes up for a running mean is not free by a symmetry that needs it for that.
        """
        free, moved = _by_training(self.trained_symmetries, self)
        if len(self.tied_to) == len(self._untrained):
            return free, moved
        more_free, more = _by_training(self._left_beside(self.tied_to), self)
        free |= more_free - self._making_up
        moved |= more - self._making_up
        for name in (more - moved) & self._making_up:
            own_free, own_moved = _by_training(self._left_beside(self._ties(name)), self)
            free |= own_free & {name}
            moved |= own_moved & {name}
        return free, moved

    @cached_property
    def _making_up(self) -> set[str]:
        """Weights whose shifts may make up for those of what does not train."""
        return {n for f in self.shift_families if len(f.names) > 1 for n in f.names}

    def _left_beside(self, still: Collection[str]) -> list[dict[str, Fraction]]:
        return left_to_training(self.scale_symmetries, still)

    def decay_of(self, name: str) -> str:
        """Say what weight decay does to a weight: a rate schedule, a real penalty, or nothing."""
        kind, share = self.kinds[name], self.free_parts.get(name)
        if share == 1:
            return EFFECT_OF_DECAY[Kind.TRADED]
        partly = share and kind in (Kind.FIXED, Kind.TIED)
        return EFFECT_ON_PARTS if partly else EFFECT_OF_DECAY[kind]

    @cached_property
    def free_parts(self) -> dict[str, float]:
        """Weights without a symmetry of which rows or columns have one, and the share of these.

        Queries, keys and values in one have no symmetry as a whole; yet the queries trade with the
        keys, the values with what reads them, and the keys' bias has no effect.
        """
        found: dict[tuple[str, tuple[int, ...]], Tensor] = {}

        def note(name: str, axes: tuple[int, ...], index: Tensor | slice) -> None:
            if self.kinds.get(name) in (Kind.FIXED, Kind.TIED, Kind.UNKNOWN):
                size = math.prod(self.parameters[name][a] for a in axes)
                free = found.setdefault((name, axes), torch.zeros(size, dtype=torch.bool))
                free[index] = True

        for part in self._moved_by_channel():
            note(part.name, part.axes, torch.as_tensor(part.index).reshape(-1))
        for p in self.parts:
            for start, stop in p.intervals:
                note(p.name, (p.axis,), slice(start, stop))
        shares: dict[str, float] = {}
        for (name, _), free in found.items():
            shares[name] = max(shares.get(name, 0.0), float(free.double().mean()))
        return shares

    def _moved_by_channel(self) -> Iterator[Slices | Block]:
        """Yield the slices of weights that move by channel while what does not train stays."""
        if not self._untrained:
            yield from (s for family in self.families for s in family.slices)
            return
        for still, makes_up in ((self.tied_to, False), (self._untrained, True)):
            for part in moved_in_training(
                self.families, self.scale_symmetries, self.parameters, still
            ):
                if (part.name in self._making_up) is makes_up:
                    yield part

    @cached_property
    def _untrained(self) -> list[str]:
        wholes = (n for v in self.scale_symmetries for n in v)
        names = dict.fromkeys([*wholes, *(n for f in self.families for n in f.names)])
        return untrained(names, self.parameters, self.frozen)

    @cached_property
    def tied_to(self) -> list[str]:
        """Buffers and frozen weights without which scale symmetries do not hold.

        Those are left out that shifts of trained weights can make up for: a scale against the
        running mean of a BatchNorm needs no other mean where a bias can take the difference.
        """
        return self._ties()

    def _ties(self, avoiding: str | None = None) -> list[str]:
        """Return them, where one weight does not make up for anything."""
        families = [f for f in self.shift_families if len(f.names) > 1 and avoiding not in f.names]
        shifted = dict.fromkeys(n for f in families for n in f.names)
        still, before = untrained(shifted, self.parameters, self.frozen), -1
        while len(still) != before:
            before = len(still)
            still = [n for n in still if not _is_matched(n, still, families)]
        matched = shifted.keys() - still
        return [n for n in self._untrained if n not in matched]

    def own_spheres(self) -> dict[str, ScaleInvariance]:
        """Return the weights that live on a sphere without any other parameter."""
        return {
            s.names[0]: s
            for s in self.spheres
            if len(s.names) == 1 and s.names[0] in self.parameters
        }

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of a model by the names they have in this audit.

        Raises:
            ValueError: the model lacks one.
        """
        found = {bare_name(n): p for n, p in unwrapped(model).named_parameters()}
        missing = [n for n in self.parameters if n not in found]
        if missing:
            raise ValueError(
                f"the model has no parameter {missing[0]!r} ({len(missing)} of "
                f"{len(self.parameters)} are missing); audit this model again"
            )
        return found


def _by_training(
    symmetries: Sequence[Mapping[str, Fraction]], audit: AuditResult
) -> tuple[set[str], set[str]]:
    """Return the trained weights that symmetries shrink while no other grows, and all they move."""
    trained = audit.parameters.keys() - audit.frozen
    own = [{n: e for n, e in v.items() if n in trained} for v in symmetries]
    return {*shrinkable(own)}, {n for v in own for n in v}


def _is_matched(name: str, still: Collection[str], families: Sequence[ShiftFamily]) -> bool:
    """Return whether any move of a weight is the same as one of weights that may move."""
    others = {*still} - {name}
    return any(_moves_freely(f, name) and others.isdisjoint(f.names) for f in families)


def _moves_freely(family: ShiftFamily, name: str) -> bool:
    """Return whether a family of shifts moves every entry of a weight by an amount of its own.

    Where a map comes between, entries may get nothing, or two of them the same.
    """
    moves = [m for m in family.moves if m.name == name]
    if len(moves) != 1 or moves[0].map or moves[0].free:
        return False
    places = moves[0].places.flatten().sort().values
    return torch.equal(places, torch.arange(family.count))
