"""What an audit found, as plain frozen data: what renderers read, and nothing that draws."""

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from onsphere._torch.execution import OutputPicker, bare_name
from onsphere._torch.materialize import unwrapped
from onsphere.symmetry.claims import (
    DOUBTING,
    EFFECT_OF_DECAY,
    HIDING,
    Family,
    Kind,
    Leak,
    Limit,
    Rescaling,
    ScaleInvariance,
    ShiftFamily,
)
from onsphere.symmetry.exact.trace import Call, UnknownOp
from onsphere.symmetry.search.partial import Part
from onsphere.symmetry.search.shift import Shift
from onsphere.symmetry.subspaces.channel_kinds import Block, ChannelKind, channel_kinds
from onsphere.symmetry.subspaces.held_wholes import UniformSymmetries
from onsphere.symmetry.subspaces.in_training import TrainedScales
from onsphere.symmetry.weight_decay import left_to_training, untrained


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
        shrinking, shares = self._freed
        movable = shares if not self._untrained else self._scales([]).shares
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
            if name in shrinking:
                return Kind.SHARED
            if shares.get(name) == 1:
                return Kind.TRADED
            if hidden or name in doubted:
                return Kind.UNKNOWN
            if name in shares:
                return Kind.PARTLY
            return Kind.TIED if movable.get(name) == 1 else Kind.FIXED

        return {n: kind(n) for n in self.parameters}

    @cached_property
    def _freed(self) -> tuple[set[str], dict[str, float]]:
        """Weights that can shrink as they train while none grows; the share of each that moves.

        A bias that makes up for a running mean is not free by a symmetry that needs it for that.
        """
        own = self._scales(self._untrained)
        more = own
        if len(self.tied_to) < len(self._untrained):
            more = self._scales(self.tied_to)
        making_up = {n for f in self.shift_families if len(f.names) > 1 for n in f.names}
        shrinking, shares = set(), {}
        for name, share in more.shares.items():
            here = more
            if name in making_up:
                further = share > own.shares.get(name, 0.0)
                here = self._scales(self._ties(name)) if further else own
            if name in here.shrinking:
                shrinking.add(name)
            if name in here.shares:
                shares[name] = here.shares[name]
        return shrinking, shares

    def _scales(self, still: Collection[str]) -> TrainedScales:
        """Return how far scales are free where some weights and buffers stay as they are."""
        symmetries = UniformSymmetries(
            self._kinds_of_channels, self.scale_symmetries, self.parameters, still
        )
        alone = [
            Block(p.name, (p.axis,), np.arange(start, stop)[None])
            for p in self.parts
            for start, stop in p.intervals
        ]
        return TrainedScales(symmetries, self.parameters.keys() - self.frozen, alone)

    @cached_property
    def _kinds_of_channels(self) -> list[ChannelKind]:
        return channel_kinds(self.families)

    def decay_of(self, name: str) -> str:
        """Say what weight decay does to a weight: a rate schedule, a real penalty, or nothing."""
        return EFFECT_OF_DECAY[self.kinds[name]]

    @cached_property
    def free_parts(self) -> dict[str, float]:
        """Weights of which only parts move along symmetries, and the share of their entries.

        Of a map half of which is rectified, say, this half trades with what reads it.
        """
        some = Kind.PARTLY, Kind.UNKNOWN
        return {n: s for n, s in self._freed[1].items() if self.kinds[n] in some}

    def shrink_alike(self, names: Collection[str]) -> bool:
        """Return whether weights can shrink by one factor while no other weight changes."""
        return self._scales(self._untrained).shrink_alike(names)

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
