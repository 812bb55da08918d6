"""What deserves a look in a run, in plain words: pure functions of its samples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onsphere.dynamics.optimizers import ON_SPHERES
from onsphere.monitor.run import COUNTS, PREDICTIONS, QUANTITIES, STATISTICS, Flag, Sample

_MEAN, _MEDIAN = STATISTICS.index("mean"), STATISTICS.index("q50")
_HELD = tuple(law.name for law in ON_SPHERES.values())


@dataclass(frozen=True)
class Thresholds:
    """When a run is flagged.

    Args:
        patience: how many samples in a row something must be seen: what is so for one step is no
            news. What is not finite is flagged at once.
        leak: share of a gradient along its weight above which the weight is on no sphere.
        runaway: factor by which a norm has grown since the first sample.
        collapse: factor by which an effective rate has fallen since its highest, beyond the fall of
            the learning rate.
        norm: factor between a norm and what its law expects.
        rotation: factor between a rotation and what its law expects. Gradients that agree from step
            to step turn a weight up to 4.4 times as far as noise does at momentum 0.9.
        radius: relative change of a norm that a sphere optimizer keeps fixed.

    Raises:
        ValueError: a value out of its range.
    """

    patience: int = 3
    leak: float = 0.1
    runaway: float = 10.0
    collapse: float = 10.0
    norm: float = 2.0
    rotation: float = 6.0
    radius: float = 0.01

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience is at least 1, got {self.patience}")
        for name in ("runaway", "collapse", "norm", "rotation"):
            if not getattr(self, name) > 1:
                raise ValueError(f"{name} is a factor above 1, got {getattr(self, name)}")
        for name in ("leak", "radius"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is a share above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class History:
    """What is known of one layer when a sample has come.

    Args:
        name: the layer.
        about: its entry in the run's header.
        row: its number.
        first: the first sample.
        peak: the sample with the highest effective rate.
        recent: the last samples, this one at the end; at most ``patience``.
        skipped: whether it has no gradient now, not even zeros, so that the optimizer skips it.
    """

    name: str
    about: Mapping[str, Any]
    row: int
    first: Sample
    peak: Sample
    recent: Sequence[Sample]
    skipped: bool = False

    @property
    def now(self) -> Sample:
        """The sample that has come."""
        return self.recent[-1]

    def value(self, sample: Sample, quantity: str, statistic: int = _MEAN) -> float:
        """Return what was measured at a sample."""
        return float(sample.values[self.row, QUANTITIES.index(quantity), statistic])

    def count(self, sample: Sample, kind: str) -> int:
        """Return how many vectors were counted at a sample."""
        return int(sample.counts[self.row, COUNTS.index(kind)])

    def expected(self, sample: Sample, quantity: str) -> float:
        """Return what the law expects at a sample."""
        return float(sample.predicted[self.row, PREDICTIONS.index(quantity)])


def flags_of(history: History, thresholds: Thresholds) -> list[Flag]:
    """Return what there is to say of a layer, one flag per kind at most.

    Args:
        history: of one layer.
        thresholds: when to speak.

    Returns:
        The flags that hold at the last sample.
    """
    return [
        Flag(kind, history.name, history.now.step, message)
        for kind, rule in RULES.items()
        for message in _first(rule(history, thresholds))
    ]


def together(flags: Sequence[Flag]) -> list[Flag]:
    """Make one flag of those of a sample that say of several layers that they are on no sphere.

    Args:
        flags: raised at one sample.
    """
    off = [flag for flag in flags if flag.message.endswith(_OFF_SPHERES)]
    if len(off) < 2:
        return list(flags)
    names = ", ".join(flag.layer for flag in off[:3]) + (", ..." if len(off) > 3 else "")
    message = (
        f"of {len(off)} weights ({names}) a share of the gradient points along the weight, so they "
        "are on no sphere, or an eps or a penalty acts on their length: what is expected of them "
        'does not hold. An audit says which are; Monitor(..., "matrices") expects nothing'
    )
    one = Flag(off[0].kind, off[0].layer, off[0].step, message)
    return [one, *(flag for flag in flags if flag not in off)]


def _first(messages: Iterator[str]) -> list[str]:
    message = next(messages, None)
    return [] if message is None else [message]


def _nonfinite(seen: History, _: Thresholds) -> Iterator[str]:
    if count := seen.count(seen.now, "nonfinite"):
        yield (
            f"{_of(count, seen)} hold a number that is not finite, in the weight or its gradient. "
            "Lower the learning rate, clip gradients, or look for a division by zero; a gradient "
            "scaler skips such steps by itself"
        )


def _dead(seen: History, limits: Thresholds) -> Iterator[str]:
    count = seen.count(seen.now, "dead")
    if not count:
        return
    got = f"{_of(count, seen)} got no gradient in the last {limits.patience} samples: "
    if seen.skipped:
        yield (
            f"{got}it is None, as of a weight that is frozen or that the loss does not use. The "
            "optimizer leaves them as they are, without weight decay too"
        )
    else:
        yield (
            f"{got}nothing that is trained depends on them, or a ReLU after them is always off. "
            "Weight decay shrinks them to nothing"
        )


def _eps(seen: History, limits: Thresholds) -> Iterator[str]:
    invariant = seen.about.get("invariant", True)
    if invariant and _lasting(seen, limits) and all(seen.count(s, "eps") for s in seen.recent):
        yield (
            f"of {_of(seen.count(seen.now, 'eps'), seen)} more than {limits.leak:.0%} of the "
            f"gradient points along the weight, so they are on no sphere: {_OFF_SPHERES}"
        )
    if _lasting(seen, limits) and all(seen.count(s, "optimizer_eps") for s in seen.recent):
        yield (
            f"the gradient of {_of(seen.count(seen.now, 'optimizer_eps'), seen)} is smaller than "
            "the optimizer's eps, which then sets the size of their steps. Lower that eps, or "
            "scale the loss up"
        )


def _runaway(seen: History, limits: Thresholds) -> Iterator[str]:
    start, now = (seen.value(s, "norm") for s in (seen.first, seen.now))
    rest = seen.expected(seen.now, "equilibrium_norm")
    if start > 0 and now >= limits.runaway * start and not _settling(seen, limits):
        end = (
            "no weight decay holds it back"
            if math.isnan(rest)
            else f"the law sees it settle at {rest:.3g}"
        )
        yield (
            f"the norm has grown from {start:.3g} to {now:.3g}, {now / start:.0f} times; {end}. "
            "The weight turns ever more slowly: use weight decay, or a sphere optimizer"
        )


def _collapse(seen: History, limits: Thresholds) -> Iterator[str]:
    best, now = (seen.value(s, "effective_lr", _MEDIAN) for s in (seen.peak, seen.now))
    lrs = [float(s.lrs[seen.row]) for s in (seen.peak, seen.now)]
    if not seen.about.get("invariant", True):
        return  # its rate does not depend on its norm
    if not (now > 0 and lrs[1] > 0) or _settling(seen, limits):
        return
    fall, meant = best / now, max(1.0, lrs[0] / lrs[1])
    if fall >= limits.collapse * meant:
        yield (
            f"the effective learning rate has fallen {fall:.0f} times since step "
            f"{seen.peak.step}, and the learning rate only {meant:.3g} times: the norm has "
            "grown instead. Use weight decay, or a sphere optimizer"
        )


def _drift(seen: History, limits: Thresholds) -> Iterator[str]:
    if not _lasting(seen, limits):
        return
    if seen.about.get("law") in _HELD:
        start, now = (seen.value(s, "norm") for s in (seen.first, seen.now))
        if start > 0 and abs(now / start - 1) > limits.radius:
            yield (
                f"the norm has moved from {start:.4g} to {now:.4g}, and the optimizer should keep "
                "it: something else changes this weight"
            )
    if 2 * seen.count(seen.now, "dead") >= seen.about.get("vectors", 1):
        return  # the laws are for vectors with gradients, and means show too few of those
    for quantity, factor in (("norm", limits.norm), ("rotation", limits.rotation)):
        ratios = [_ratio(seen, s, quantity) for s in seen.recent]
        if all(r > factor for r in ratios) or all(0 <= r < 1 / factor for r in ratios):
            now, wanted = seen.value(seen.now, quantity), seen.expected(seen.now, quantity)
            yield f"{_DRIFTS[quantity].format(now, wanted)}. {_WHY_DRIFT}"


_DRIFTS = {
    "norm": "the norm is {:.3g}, where the law of this optimizer expects {:.3g}",
    "rotation": "it turns by {:.3g} radians per step, where the law expects {:.3g} at this norm",
}
_WHY_DRIFT = (
    "The law takes gradients for noise of constant size, orthogonal to the weight: either they are "
    "not, or something else than the optimizer changes the weight"
)

_OFF_SPHERES = (
    "the eps of the normalization outweighs their output (the vector is too short), or a penalty "
    "in the loss acts on their length"
)

RULES: dict[str, Callable[[History, Thresholds], Iterator[str]]] = {
    "nonfinite": _nonfinite,
    "dead": _dead,
    "eps": _eps,
    "runaway": _runaway,
    "collapse": _collapse,
    "drift": _drift,
}
"""What is looked for: kind -> the sentences to say, the first of which counts."""


def _ratio(seen: History, sample: Sample, quantity: str) -> float:
    wanted = seen.expected(sample, quantity)
    return seen.value(sample, quantity) / wanted if wanted > 0 else math.nan


def _settling(seen: History, limits: Thresholds) -> bool:
    """Whether a norm is on its way to where the law says that weight decay will hold it."""
    rest = seen.expected(seen.now, "equilibrium_norm")
    return seen.value(seen.now, "norm") <= limits.norm * rest


def _lasting(seen: History, limits: Thresholds) -> bool:
    return len(seen.recent) >= limits.patience


def _of(count: int, seen: History) -> str:
    total = seen.about.get("vectors", count)
    return f"{count:,} of {total:,} vectors" if total > 1 else "the only vector"
