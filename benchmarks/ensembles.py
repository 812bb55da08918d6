"""Small networks of the studies trained together against alone: time per network and step.

``python -m benchmarks ensembles [METHOD ...]``: all methods, plain and on the sphere, on one thread
and on two. Alone and together alternate; the least of each counts, since what else runs on a
machine only adds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from onsphere.report import Table
from onsphere.studies.engine.job import Inputs
from onsphere.studies.setup.data import Images, Source
from onsphere.studies.setup.ensemble import train_ensemble
from onsphere.studies.setup.network import LABELS, STUDIED
from onsphere.studies.setup.training import Space, Training, train

MEMBERS = 9
"""As many as one row of the grid of rates has."""

_STEPS, _ROUNDS, _ALONE = 40, 5, 3


def tables(words: Sequence[str]) -> Iterator[Table]:
    """Measure the named methods (all of them, if none is named), one table per thread count."""
    images = Source("digits").load()
    torch.use_deterministic_algorithms(True)  # as the studies do
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows = [
            (LABELS[method], space, *_ratio(method, space, images))
            for method in words or STUDIED
            for space in _spaces(method)
        ]
        yield Table(
            f"{MEMBERS} networks of width 8 on digits, batches of 64, {threads} "
            f"{'thread' if threads == 1 else 'threads'}: ms per network and step",
            ("method", "space", "alone", "together", "alone / together", "CPU, alone / together"),
            rows,
            f"Least of {_ROUNDS} alternating rounds of {_STEPS} steps, evaluation left out.",
        )


def _spaces(method: str) -> tuple[Space, ...]:
    return ("plain",) if method == "none" else ("plain", "sphere")


def _ratio(method: str, space: Space, images: Images) -> tuple[float, float, float, float]:
    """Milliseconds alone and together, their ratio, and that of the CPU's time."""

    def runs(steps: int) -> list[Training]:
        return [
            Training("digits", method, space, lr=10 ** (k / 4 - 2.5), steps=steps, seed=k, width=8)
            for k in range(MEMBERS)
        ]

    def together(steps: int) -> int:
        train_ensemble(runs(steps), images)
        return MEMBERS

    def alone(steps: int) -> int:
        for settings in runs(steps)[:_ALONE]:
            train(asdict(settings), Inputs(images))
        return _ALONE

    least: dict[Callable[[int], int], tuple[float, float]] = {}
    for _ in range(_ROUNDS):
        for way in (alone, together):
            clock, cpu = _per_step(way)
            before = least.get(way, (clock, cpu))
            least[way] = min(before[0], clock), min(before[1], cpu)
    (wall, cpu_alone), (wall_together, cpu_together) = least[alone], least[together]
    return 1e3 * wall, 1e3 * wall_together, wall / wall_together, cpu_alone / cpu_together


def _per_step(way: Callable[[int], int]) -> tuple[float, float]:
    """Seconds of a network and step, on the clock and of the CPU: a long run less a short one."""
    times = []
    for steps in (1, 1 + _STEPS):
        clock, cpu = time.perf_counter(), time.process_time()
        networks = way(steps)
        times.append((time.perf_counter() - clock, time.process_time() - cpu))
    return tuple(max(b - a, 1e-9) / _STEPS / networks for a, b in zip(*times, strict=True))  # type: ignore[return-value]
