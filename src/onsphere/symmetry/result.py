"""What an audit found, as plain frozen data: what renderers read, and nothing that draws."""

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from onsphere._torch.execution import OutputPicker, bare_name
from onsphere._torch.materialize import unwrapped
from onsphere.symmetry.claims import (
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
)
from onsphere.symmetry.exact.trace import Call, UnknownOp
from onsphere.symmetry.search.partial import Part
from onsphere.symmetry.search.shift import Shift
from onsphere.symmetry.weight_decay import shrinkable


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
        others: further inputs on which its operations were followed, some with other weights.
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

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """What is free about the scale of each parameter."""
        alone = self.own_spheres()
        free = shrinkable(self.scale_symmetries, self.parameters)
        traded = {n for v in self.scale_symmetries for n in v}
        hidden = self.unknown_ops or any(x.kind in HIDING for x in self.limits)
        rest = Kind.UNKNOWN if hidden else Kind.FIXED

        def kind(name: str) -> Kind:
            if name in self.inert:
                return Kind.INERT
            if name in self.unreached:
                return Kind.UNREACHED
            if name in alone:
                return Kind.SPHERE
            return Kind.SHARED if name in free else Kind.TRADED if name in traded else rest

        return {n: kind(n) for n in self.parameters}

    def decay_of(self, name: str) -> str:
        """Say what weight decay does to a weight: a rate schedule, a real penalty, or nothing."""
        kind, share = self.kinds[name], self.free_parts.get(name)
        if share == 1:
            return EFFECT_OF_DECAY[Kind.TRADED]
        return EFFECT_ON_PARTS if share and kind is Kind.FIXED else EFFECT_OF_DECAY[kind]

    @cached_property
    def free_parts(self) -> dict[str, float]:
        """Weights without a symmetry of which rows or columns have one, and the share of these.

        Queries, keys and values in one have no symmetry as a whole; yet the queries trade with the
        keys, the values with what reads them, and the keys' bias has no effect.
        """
        found: dict[tuple[str, tuple[int, ...]], Tensor] = {}

        def note(name: str, axes: tuple[int, ...], index: Tensor | slice) -> None:
            if self.kinds.get(name) in (Kind.FIXED, Kind.UNKNOWN):
                size = math.prod(self.parameters[name][a] for a in axes)
                free = found.setdefault((name, axes), torch.zeros(size, dtype=torch.bool))
                free[index] = True

        for family in self.families:
            for part in family.slices:
                note(part.name, part.axes, part.index.reshape(-1))
        for p in self.parts:
            for start, stop in p.intervals:
                note(p.name, (p.axis,), slice(start, stop))
        shares: dict[str, float] = {}
        for (name, _), free in found.items():
            shares[name] = max(shares.get(name, 0.0), float(free.double().mean()))
        return shares

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
