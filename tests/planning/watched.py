"""Runs as a monitor writes them, made of random walks."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from onsphere.dynamics import random_walk
from onsphere.monitor.run import COUNTS, PREDICTIONS, QUANTITIES, STATISTICS, Run, Sample

LEVEL, WIDTH, EVERY = 4.0, 64, 5


def watched(law: str, kind, settings: dict, schedule, initial_norm: float) -> Run:
    """Walk under an optimizer; a layer with a law, one without, and one that has no norm."""
    generator = torch.Generator().manual_seed(0)
    factors = schedule.factors(torch.arange(schedule.steps).double())
    walk = random_walk(
        partial(kind, **settings), steps=schedule.steps, shape=(WIDTH,), vectors=32,
        initial_norm=initial_norm, unit_gradient_square=LEVEL, lrs=settings["lr"] * factors,
        generator=generator,
    )  # fmt: skip
    named = {"shape": [32, WIDTH], "vectors": 32, "coordinates": WIDTH, "group": 0, "degree": 2}
    layers = {
        "walk": {**named, "law": law},
        "other": {**named, "law": None},
        "dead": {**named, "law": law},
    }
    optimizer = {"name": kind.__name__, **settings, "groups": [settings]}
    samples = [
        _sample(step, walk, settings["lr"] * float(factors[step]))
        for step in range(EVERY, schedule.steps, EVERY)
    ]
    return Run(optimizer, layers, samples, every=EVERY)


def write(run: Run, path: Path) -> Path:
    lines = [run.header(), *(run.sample_line(sample) for sample in run.samples)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _sample(step: int, walk: dict[str, torch.Tensor], lr: float) -> Sample:
    values = np.full((3, len(QUANTITIES), len(STATISTICS)), np.nan)
    rotation = walk["rotation"][step].square().mean().sqrt()
    for name, value in (
        ("norm", walk["norm"][step].mean()), ("rotation", rotation),
        ("unit_gradient_square", LEVEL),
    ):  # fmt: skip
        values[:2, QUANTITIES.index(name)] = float(value)
    counts, predicted = np.zeros((3, len(COUNTS))), np.full((3, len(PREDICTIONS)), np.nan)
    return Sample(step, np.full(3, lr), values, counts, predicted)
