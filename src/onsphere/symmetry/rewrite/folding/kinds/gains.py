"""Gains and shifts into the linear maps that read them, layer scale into what writes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from onsphere.symmetry.rewrite.folding.kinds.batch_norms import batch_norms
from onsphere.symmetry.rewrite.folding.linear_maps import LinearMap
from onsphere.symmetry.rewrite.folding.targets import Known, Normal, State, Target, listed


@dataclass(frozen=True, eq=False)
class GainFold:
    r"""Move a gain (and shift) into linear maps that read it, or that write what it multiplies.

    Readers become :math:`W\,\mathrm{diag}(g)`, their bias :math:`b + W\beta`.

    Args:
        path: of the module that holds it.
        gain: its name.
        shift: name of its shift, if it has one.
        offset: the gain is this plus what is stored.
        scaled: what is multiplied by the gain.
        readers: the maps that take the shift.
        order: for each reader, the channel of each of its inputs.
        fresh: maps among these that get a bias.
        into: names of the modules that it goes into.
        keeps_shift: leave the shift where it is, divided by the gain.
        why: why it is left there.
    """

    path: str
    gain: str
    shift: str | None
    offset: float
    scaled: tuple[Target, ...]
    readers: tuple[LinearMap, ...]
    order: tuple[Tensor, ...]
    fresh: tuple[LinearMap, ...]
    into: tuple[str, ...]
    kind: str = "gain"
    keeps_shift: bool = False
    why: str = ""

    @property
    def own(self) -> tuple[str, ...]:
        """Names of gain and shift."""
        return (self.gain, *((self.shift,) if self.shift else ()))

    def applied(self, state: Mapping[str, Tensor]) -> State:
        """Return what changes."""
        stored = state[self.gain]
        gain = (stored + self.offset).reshape(-1)
        changed: State = {}
        if self.shift and self.keeps_shift:
            changed[self.shift] = state[self.shift] / (stored + self.offset)
        elif self.shift:
            shift = state[self.shift].reshape(-1)
            for reader, order in zip(self.readers, self.order, strict=True):
                made = reader.of_constant(state[reader.weight], shift[order])
                if made is None:
                    raise ValueError(f"{reader.path} makes no constant of a constant")
                changed[reader.bias] = changed.get(reader.bias, state[reader.bias]) + made
            changed[self.shift] = torch.zeros_like(state[self.shift])
        for t in self.scaled:
            now = changed.get(t.name, state[t.name])
            changed[t.name] = now * t.factors(gain, now.shape)
        changed[self.gain] = torch.full_like(stored, 1.0 - self.offset)
        return changed

    def drawn(self, state: Mapping[str, Tensor], normal: Normal) -> State:
        """Draw what moves at random: gains of both signs, shifts that a ReLU would notice."""
        stored = state[self.gain]
        size = float((stored + self.offset).abs().mean())
        made = {self.gain: size * (normal(stored) + 0.1) - self.offset}
        if self.shift:
            made[self.shift] = state[self.shift] + size * normal(state[self.shift])
        for t in self.scaled:
            bias = state[t.name]
            if bias.ndim == 1:
                made[t.name] = bias + (float(bias.abs().mean()) + 0.1) * normal(bias)
        return made

    def alternatives(self) -> "list[GainFold]":
        """Return what to try where this is not right: less of the same."""
        if self.shift is None or self.keeps_shift:
            return []
        return [replace(self, keeps_shift=True, fresh=(), why="another reader does not take it")]

    @property
    def note(self) -> str:
        """What is to be said about it."""
        return f"its shift stays: {self.why}" if self.keeps_shift else ""


def gains(known: Known) -> dict[str, str]:
    """Return vectors that may be gains, by name, with the path of their module."""
    norms = set(batch_norms(known.model))
    biases = known.biases
    found = {}
    for family in known.families:
        for s in family.slices:
            path, _, leaf = s.name.rpartition(".")
            t = known.state[s.name]
            vector = t.numel() == max(t.shape, default=0)
            if vector and path not in norms and s.name not in biases and leaf not in _SHIFTS:
                found[s.name] = path
    return found


_SHIFTS = ("bias", "beta", "b", "running_mean", "running_var")
"""Names of what is added, never multiplied."""


def propose_gain(known: Known, name: str, path: str) -> GainFold | str:
    """Return how to fold a gain into linear maps, or why not."""
    count = known.state[name].numel()
    tied = [(f, s) for f in known.families for s in f.slices if s.name == name]
    options = [(f, s) for f, s in tied if s.index.shape[1] == 1]
    shift = _shift_of(known, name, path)
    targets: list[Target] = []
    taken = torch.zeros(count, dtype=torch.bool)
    mixed = ""
    for family, own in sorted(options, key=lambda o: len(o[0].slices)):
        channels = own.index[:, 0]
        if bool(taken[channels].any()):
            continue
        against = [s for s in family.slices if s.exponent == -own.exponent]
        other = [s.name for s in family.slices if s not in against and s.name not in (name, shift)]
        if other or not against:
            mixed = mixed or listed(sorted({*other}))
            continue
        taken[channels] = True
        targets += [Target(s.name, s.axes, s.index, channels) for s in against]
    if not bool(taken.all()):
        if mixed:
            return f"it trades with more than linear maps: {mixed}"
        return "no linear maps alone read it or write it"
    if not any(known.state[t.name].ndim > 1 for t in targets):
        return f"no linear maps read it or write it, only {listed([t.name for t in targets])}"
    into = tuple(dict.fromkeys(_owner(t.name) for t in targets if known.state[t.name].ndim > 1))
    made = GainFold(
        path, name, shift, known.offsets.get(name, 0.0), tuple(targets), (), (), (), into,
        "gain" if is_norm(known.model, path) else "scale",
    )  # fmt: skip
    if shift is None or not bool(known.state[shift].any()):
        return replace(made, shift=None)
    return _with_shift(known, made, targets)


def _with_shift(known: Known, made: GainFold, targets: Sequence[Target]) -> GainFold | str:
    """Let the readers' biases take the shift, or leave it where it is, divided by the gain."""
    readers, order, why = [], [], ""
    for t in targets:
        if known.state[t.name].ndim < 2:
            continue
        for one in known.maps.get(t.name, ()):
            if not known.gives_bias(one):
                why = f"{one.path} has no bias" + (
                    "" if known.takes_bias else ", and would load none"
                )
            elif one.pads_with_zeros:
                why = f"{one.path} pads with zeros"
            elif one.transposed:
                why = f"{one.path} is transposed"
            else:
                places = _inputs_of(known, one, t)
                why = why if places is not None else f"{one.path} reads it in another order"
                if places is not None:
                    readers.append(one)
                    order.append(places)
        if t.name not in known.maps:
            why = f"{t.name} belongs to no module with a bias"
    gain = known.state[made.gain] + made.offset
    if why and not bool(gain.all()):
        return f"its shift cannot move ({why}), and its gain has zeros"
    if why:
        return replace(made, keeps_shift=True, why=why)
    fresh = tuple(m for m in readers if not m.has_bias)
    return replace(made, readers=tuple(readers), order=tuple(order), fresh=fresh)


def _inputs_of(known: Known, one: LinearMap, t: Target) -> Tensor | None:
    """Return for each input of a map the channel that it holds."""
    shape = known.state[one.weight].shape
    found = torch.full((shape[one.columns] * one.groups,), -1)
    if one.groups == 1 and t.axes == (one.columns,):
        found[t.index] = t.channels[:, None].expand(t.index.shape)
    elif one.groups > 1 and t.axes in ((0,), (0, 1)) and not one.transposed:
        width, each = shape[1], shape[0] // one.groups
        place = t.index[:, 0] if t.axes == (0, 1) else t.index[:, 0] * width
        found[place // width // each * width + place % width] = t.channels
    return found if bool((found >= 0).all()) else None


def _shift_of(known: Known, name: str, path: str) -> str | None:
    """Return the shift beside a gain: another vector of its module that scales as it does."""
    for family in known.families:
        own = [s for s in family.slices if s.name == name]
        for s in family.slices:
            beside = s.name.rpartition(".")[0] == path and s.name != name
            alike = known.state[s.name].shape == known.state[name].shape
            if own and beside and alike and s.exponent == own[0].exponent:
                return s.name
    return None


def is_norm(model: nn.Module, path: str) -> bool:
    """Return whether the class of a module calls itself a norm."""
    return "norm" in type(model.get_submodule(path)).__name__.lower()


def _owner(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return path if leaf == "weight" else name
