r"""BatchNorm into the map that writes its input.

A family that scales a running mean together with rows of a map says which map writes the input of
that norm, channel by channel; one that scales a gain against columns says which maps read it. It
says so through views, slices, concatenations and groups. It does not say that nothing stands
between the two (a ReLU has the same families), so what is proposed here is tried on numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from onsphere.symmetry.claims import Family, Slices
from onsphere.symmetry.rewrite.folding.linear_maps import LinearMap
from onsphere.symmetry.rewrite.folding.targets import Known, Normal, State, Target, listed


@dataclass(frozen=True, eq=False)
class BatchNormFold:
    r"""Move gain and statistics of a norm with running statistics into what writes its input.

    With :math:`s = g/\sqrt{v+\epsilon}` the rows of the map become :math:`s\,w` and its bias
    :math:`s\,(b-m)+\beta`.

    Args:
        path: of the norm.
        gain: name of its gain, if it has one.
        shift: name of its shift, if it has one.
        mean: name of its running mean.
        variance: name of its running variance.
        eps: of the norm.
        scaled: the weights and biases that write its input.
        biases: biases that take the shift, one entry or more for each channel.
        fresh: maps among these that get a bias.
        into: names of the modules that it goes into.
    """

    path: str
    gain: str | None
    shift: str | None
    mean: str
    variance: str
    eps: float
    scaled: tuple[Target, ...]
    biases: tuple[Target, ...]
    fresh: tuple[LinearMap, ...]
    into: tuple[str, ...]
    keeps_shift: bool = False
    kind: str = "batchnorm"

    @property
    def own(self) -> tuple[str, ...]:
        """Names of all that the norm holds."""
        return tuple(n for n in (self.gain, self.shift, self.mean, self.variance) if n)

    def applied(self, state: Mapping[str, Tensor]) -> State:
        """Return what changes."""
        mean, variance = state[self.mean], state[self.variance]
        scale = (variance + self.eps).rsqrt()
        scale = scale * state[self.gain] if self.gain else scale
        term = -mean * scale + (state[self.shift] if self.shift else 0.0)
        changed: State = {}
        for t in self.scaled:
            now = changed.get(t.name, state[t.name])
            changed[t.name] = now * t.factors(scale, now.shape)
        for t in () if self.keeps_shift else self.biases:
            now = changed.get(t.name, state[t.name])
            changed[t.name] = now + t.terms(term, now.shape)
        if self.gain:
            changed[self.gain] = torch.ones_like(state[self.gain])
        if self.shift:
            changed[self.shift] = term if self.keeps_shift else torch.zeros_like(term)
        changed[self.mean] = torch.zeros_like(mean)
        changed[self.variance] = torch.full_like(variance, 1.0 - self.eps)
        return changed

    def drawn(self, state: Mapping[str, Tensor], normal: Normal) -> State:
        """Draw what moves at random: gains of both signs, shifts that a ReLU would notice."""
        variance = state[self.variance]
        made = {self.mean: state[self.mean] + variance.sqrt() * normal(variance)}
        if self.gain:
            made[self.gain] = normal(state[self.gain]) + 0.1
        if self.shift:
            made[self.shift] = state[self.shift] + normal(state[self.shift])
        return made

    def alternatives(self) -> "list[BatchNormFold]":
        """Return what to try where this is not right: less of the same."""
        if self.keeps_shift or self.shift is None:
            return []
        return [replace(self, keeps_shift=True, fresh=())]

    @property
    def note(self) -> str:
        """What is to be said about it."""
        return "its shift stays in its own bias" if self.keeps_shift else ""


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold running statistics, by path."""
    return {
        path: m
        for path, m in model.named_modules()
        if all(isinstance(m._buffers.get(n), Tensor) for n in ("running_mean", "running_var"))
    }


def propose_batch_norm(known: Known, path: str, module: nn.Module) -> BatchNormFold | str:
    """Return how to fold a norm with running statistics, or why not."""
    mean = f"{path}.running_mean"
    eps = eps_of(module)
    if eps is None:
        return "its eps is not known"
    count = known.state[mean].numel()
    tied = [(f, s) for f in known.families for s in f.slices if s.name == mean]
    writers = [w for f, s in tied if (w := _writer(known, f, s)) is not None]
    if not writers:
        return "no linear map writes its input channel by channel"
    others = {
        s.name.rpartition(".")[0]
        for f, _, _ in writers
        for s in f.slices
        if s.name.endswith("running_mean") and s.name != mean
    }
    if others:
        return f"others read its input as well: {listed(sorted(others))}"
    chosen = _cover(writers, count)
    if chosen is None:
        return "no linear map writes some of the channels of its input"
    targets = [t for _, _, ts in chosen for t in ts]
    outputs = _outputs(known, targets)
    own = {
        n: f"{path}.{n}" for n in ("weight", "bias") if isinstance(getattr(module, n, None), Tensor)
    }
    made = _biases(known, outputs)
    covered = torch.zeros(count, dtype=torch.bool)
    for t, _ in made:
        covered[t.channels] = True
    complete = bool(covered.all())
    if not complete and "bias" not in own:
        return "the map that writes its input cannot take its shift: there is no bias"
    into = tuple(dict.fromkeys(m.path for _, m in outputs))
    return BatchNormFold(
        path, own.get("weight"), own.get("bias"), mean, f"{path}.running_var", eps,
        tuple(targets), tuple(t for t, _ in made), tuple(m for _, m in made if not m.has_bias),
        into or tuple(dict.fromkeys(t.name for t in targets)), not complete,
    )  # fmt: skip


def eps_of(module: nn.Module) -> float | None:
    """Return the eps of a norm with running statistics: its attribute, or what it computes with."""
    eps = getattr(module, "eps", None)
    if isinstance(eps, float):
        return eps
    held = {n: b for n, b in module._buffers.items() if b is not None}
    one = {n: torch.ones_like(b) for n, b in held.items()}
    one |= {
        n: torch.zeros_like(one[n]) for n in ("running_mean", "running_var", "bias") if n in one
    }
    count = one["running_mean"].numel()
    x = torch.ones(1, count, 1, 1, dtype=one["running_mean"].dtype)
    try:
        y = torch.func.functional_call(module, one, (x,))
    except Exception:
        return None
    return round(1 / float(y.flatten()[0]) ** 2, 12)


Writer = tuple[Family, Tensor, list[Target]]
"""A family, the channels of the norm that it covers, and the weights that write them."""


def _writer(known: Known, family: Family, mean: Slices) -> Writer | None:
    """Return what writes a norm's input by one family: all that scales as its mean does."""
    if mean.index.shape[1] != 1:
        return None
    channels = mean.index[:, 0]
    same = [s for s in family.slices if s.exponent == mean.exponent and s.name != mean.name]
    found = [
        Target(s.name, s.axes, s.index, channels)
        for s in same
        if s.name in known.maps or s.name in known.biases or known.state[s.name].ndim > 1
    ]
    if not any(known.state[t.name].ndim > 1 for t in found):
        return None
    return family, channels, found


def _cover(writers: Sequence[Writer], count: int) -> list[Writer] | None:
    """Choose families that cover each channel once."""
    taken = torch.zeros(count, dtype=torch.bool)
    chosen = []
    for one in sorted(writers, key=lambda w: len(w[0].slices)):
        if not bool(taken[one[1]].any()):
            taken[one[1]] = True
            chosen.append(one)
    return chosen if bool(taken.all()) else None


def _outputs(known: Known, targets: Iterable[Target]) -> list[tuple[Target, LinearMap]]:
    """Return the targets that are outputs of known maps."""
    pairs = [(t, m) for t in targets for m in known.maps.get(t.name, ())[:1]]
    return [(t, m) for t, m in pairs if t.axes in ((m.outputs_along,), (0, 1))]


def _biases(
    known: Known, outputs: Sequence[tuple[Target, LinearMap]]
) -> list[tuple[Target, LinearMap]]:
    """Return for each channel one bias, as a target."""
    found: list[tuple[Target, LinearMap]] = []
    taken: set[int] = set()
    ranked = sorted(outputs, key=lambda pair: not pair[1].has_bias)
    for t, one in ranked:
        channels = set(t.channels.tolist())
        if not known.gives_bias(one) or channels & taken:
            continue
        taken |= channels
        index = _bias_entries(one, t, known.state[one.weight].shape)
        found.append((Target(one.bias, (0,), index, t.channels), one))
    return found


def _bias_entries(one: LinearMap, t: Target, shape: Sequence[int]) -> Tensor:
    """Return the entries of a map's bias that belong to each channel of its outputs.

    A grouped transposed convolution has its outputs along the second axis, those of one group; a
    row of the first axis, or a place in both, says which group.
    """
    if not (one.transposed and one.groups > 1):
        return t.index
    width, each = shape[1], shape[0] // one.groups
    place = t.index[:, :1] if t.axes == (0, 1) else t.index[:, :1] * width
    return place // width // each * width + place % width
