"""Where a model is tested: near its own weights, far from them, and on large batches.

A symmetry holds everywhere, so one that is none shows at almost any weights. What numbers alone
say is tested at more of them: a threshold, a clamp or a meeting of inputs acts at some weights
only. A small model has few tokens to show it, and is drawn more often; a large one takes long, and
shows at once on many weights what it does.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from onsphere._torch.execution import ModelError
from onsphere.symmetry.numeric.certificate import (
    EPSILON,
    WORST_AMPLIFICATION,
    is_alive,
    is_well_conditioned,
    rounding_floor,
)
from onsphere.symmetry.numeric.probe import Point, Points, Probe

_SIZES = (1.0, 0.4, 2.5)
"""Sizes of random weights tried in turn: a signal may saturate at one and die at another."""
_FAR_SIZES = (0.4, 2.0, 0.1, 5.0, 15.0)
"""Sizes of weights far from the model's own."""
_LEAST = 0.1
"""How large weights become that are tiny, such as a layer scale of 1e-6."""
_LOOKUPS = 6
"""How many further draws are made where inputs look up rows."""
_REDRAWS = 15
"""How many further draws are made where the model is small."""
_WIDE_SIZES = (1.0, 0.1, 0.4, 2.5, 0.25, 10.0, 0.7)
_VECTORS = (1.0, 0.3, 0.1, 3.0)
"""Sizes of random matrices and vectors there."""
_SECONDS = 30.0
"""How long well-conditioned weights are looked for."""


@dataclass(frozen=True)
class Samples:
    """Weights and inputs at which claims are tested, each drawn once for all who ask.

    Args:
        near: random weights and inputs, and the given ones where numbers can be compared there.
        random: those of them that are random.
        far: weights of many sizes; of a huge model its own.
        wide: large batches of inputs that differ much, and inputs that look up the same rows.
        many: further weights of many sizes, where the model is small.
        large: whether the model is large, so that every evaluation takes long.
    """

    near: Sequence[Point]
    random: Sequence[Point]
    far: Points
    wide: Points
    many: Points
    large: bool

    @property
    def told(self) -> Iterator[Point]:
        """Yield the points at which what the operations tell is put to the test."""
        return chain(self.near, () if self.large else chain(islice(self.far, 3), self.wide))

    @property
    def further(self) -> Iterator[Point]:
        """Yield the points at which what only numbers say is put to the test."""
        return chain(islice(self.far, 3), self.wide, self.many)


def samples(probe: Probe) -> Samples:
    """Draw where a model is tested; points far away and large batches when they are asked for.

    Raises:
        ModelError: no weights near the model's own give numbers that can be compared.
    """
    given = [probe.given()] if is_well_conditioned(probe, probe.given()) else []
    random = random_points(probe, 1 if probe.large else 2)
    far = given if probe.huge else _far_points(probe, _FAR_SIZES[: 1 if probe.large else None])
    wide, many = (
        Points(p for p in drawn if is_well_conditioned(probe, p))
        for drawn in (_wide_points(probe), _many_points(probe))
    )
    return Samples([*random, *given], random, Points(far), wide, many, probe.large)


def random_points(probe: Probe, count: int, turn: int = 0) -> list[Point]:
    """Draw random weights at which the model is well conditioned, and its output not constant.

    Args:
        probe: the model.
        count: how many are wanted.
        turn: inputs of other lengths and of the given ones take turns from here on.

    Returns:
        As many points; fewer, and worse ones, where no others were found in time.

    Raises:
        ModelError: no weights near the model's own give numbers that can be compared.
    """
    points: list[Point] = []
    spare: list[tuple[float, Point]] = []
    start = time.thread_time()
    for attempt, (noise, size) in enumerate(_draws(count, turn)):
        # Shapes take turns. A large model is drawn once, so that tiny weights count there too.
        least = _LEAST if probe.large else 0.0
        point = probe.redrawn(noise, size, turn + attempt, least)
        floor = rounding_floor(probe, point)
        if floor < WORST_AMPLIFICATION * EPSILON and is_alive(probe, point):
            points.append(point)
        else:
            spare = sorted([*spare, (floor, point)], key=lambda pair: pair[0])[:count]
        if len(points) == count or time.thread_time() - start > _SECONDS:
            break
    points = points or [p for floor, p in spare if floor < 1][:count]
    if points:
        return points
    probe.baseline(probe.redrawn(0.1))  # where the model does not run, it says why
    raise ModelError(
        "no weights near the model's own give numbers that can be compared: the output is not "
        "finite, or a normalization divides by rounding errors" + _on_inputs(probe)
    )


def _on_inputs(probe: Probe) -> str:
    """Say of the inputs what may be why: that one is empty, or holds NaN."""
    given = probe.given()
    tensors = [t for t in tree_leaves((given.args, given.kwargs)) if _is_plain(t)]
    empty = [t for t in tensors if not t.numel()]
    if empty:
        return f"; an input is empty, of shape {tuple(empty[0].shape)}: give at least one example"
    if any(bool(t.isnan().any()) for t in tensors):
        return "; an input holds NaN: give one that does not"
    return ""


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _draws(count: int, turn: int) -> Iterator[tuple[float, float]]:
    """Yield how far weights are moved and how large they are: near first, then far and wide."""
    for attempt in range(10 * count):
        yield 0.4 / 2 ** (attempt // 3), _SIZES[(attempt + turn) % len(_SIZES)]
    for attempt in range(60 * count):
        yield (0.1, 1.0, 0.4)[attempt % 3], (5.0, 0.4, 15.0, 1.0)[attempt % 4]


def _far_points(probe: Probe, sizes: Sequence[float]) -> Iterator[Point]:
    """Draw weights of many sizes: what is lost in rounding at one of them shows at another.

    Weights that are tiny, such as a layer scale of 1e-6, are of ordinary size there.
    """
    for turn, size in enumerate(sizes):
        for noise in (1.0, 0.5, 0.3):
            # The shapes of a large model take turns too: the near point has the other one.
            point = probe.redrawn(noise, size, turn + int(probe.large), _LEAST)
            if is_well_conditioned(probe, point):
                yield point
                break


def _wide_points(probe: Probe) -> Iterator[Point]:
    """Draw large batches, and inputs that look up the same rows.

    What a large model does shows on any batch, but where values decide what runs.
    """
    if probe.huge:
        return
    batches = ((0.4, 1.0), (1.0, 2.0), (1.0, 0.4))
    for noise, size in batches[: int(probe.traced.data_dependent) if probe.large else None]:
        yield probe.redrawn(noise, size, many=True)
    lookups = 1 if probe.large else _LOOKUPS
    for turn in range(lookups if probe.others.rows else 0):
        yield probe.redrawn(0.4, 1.0, turn, meet=True)


def _many_points(probe: Probe) -> Iterator[Point]:
    """Draw many weights of a small model, which has few tokens to show what it does."""
    for turn in range(_REDRAWS if probe.small else 0):
        yield probe.redrawn(
            (0.3, 1.0)[turn % 2],
            _WIDE_SIZES[turn % len(_WIDE_SIZES)],
            turn,
            meet=bool(probe.others.rows) and turn % 3 == 0,
            anew=turn % 3 == 1,
            vectors=_VECTORS[turn % len(_VECTORS)],
        )
