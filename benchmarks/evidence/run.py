"""One run: a task, a space, its rates and a seed."""

import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

import onsphere as osp
from benchmarks.evidence.problem import KINDS, Problem
from onsphere.optim import on_sphere
from onsphere.studies.engine.job import Cell, Config, Inputs, Outcome, Task

Space = Literal["plain", "rate", "wrapped", "rotation"]

WARMUP = 0.05
"""Share of the steps over which the rate rises, in a line; then it falls as a cosine, to 0."""

_LOOKS = 16  # how often a run looks at the validation data


@dataclass(frozen=True)
class Run:
    """How one network is trained.

    Args:
        kind: a key of :data:`~benchmarks.evidence.problem.KINDS`.
        space: ``"plain"``: the base optimizer; ``"rate"``: ours, with one rate for all weights,
            as it is by default; ``"wrapped"``: the base optimizer in ``on_sphere``;
            ``"rotation"``: ours, weights on spheres turn by ``rotation`` a step, all others have
            the rate ``lr``.
        lr: peak rate.
        weight_decay: of matrices that are not on spheres (in ``"plain"``, of all).
        rotation: peak rotation in radians per step.
        seed: of the initial weights and the order of the data.
        steps: how many.
        width: of the network.
        batch: examples per step.
    """

    kind: str
    space: Space
    lr: float
    weight_decay: float
    rotation: float | None
    seed: int
    steps: int
    width: int
    batch: int

    @property
    def swept(self) -> float:
        """The number that its space tunes: a rate, or a rotation."""
        return self.lr if self.rotation is None else self.rotation

    def at(self, swept: float, weight_decay: float) -> "Run":
        """Return the same run with another rate (or rotation) and decay."""
        new = {"lr" if self.rotation is None else "rotation": swept}
        return replace(self, **new, weight_decay=weight_decay)  # type: ignore[arg-type]

    @property
    def images(self) -> str:
        """The data set that its worker loads."""
        return KINDS[self.kind].images

    def cell(self, text: Cell) -> Cell:
        """Return the cell of this run; a GPT needs the cell of the text."""
        needs = (text,) if self.kind == "gpt" else ()
        return Cell(TRAIN, asdict(self), needs, cost=self.steps * KINDS[self.kind].cost)


def factor(step: int, steps: int) -> float:
    """Return what the peak rates are multiplied by at a step of so many, counted from 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def train(config: Config, inputs: Inputs) -> Outcome:
    """Train, look at the validation loss now and then, and at test data once."""
    run = Run(**config)
    problem = KINDS[run.kind].make(run.width, run.batch, run.seed, inputs)
    optimizer, on_spheres = optimizer_for(run, problem)
    start = time.process_time()
    result = follow(problem, optimizer, run.steps, looks=_LOOKS)
    test_loss, test_accuracy = problem.evaluate(*problem.test)
    return Outcome(
        result
        | {
            "test_loss": test_loss if math.isfinite(test_loss) else None,
            "test_accuracy": test_accuracy,
            "on_spheres": on_spheres,
            "parameters": sum(p.numel() for p in problem.model.parameters()),
            "cpu_seconds": time.process_time() - start,
        }
    )


def follow(
    problem: Problem, optimizer: torch.optim.Optimizer, steps: int, *, looks: int
) -> dict[str, Any]:
    """Train under the schedule; ``None`` is a loss without a number.

    Args:
        problem: with the model that is trained.
        optimizer: its groups have their peak rates.
        steps: how many.
        looks: how often the validation loss is taken on the way, beside the end.

    Returns:
        Loss and accuracy on validation data, the curve of that loss, and CPU seconds of training.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, steps=steps))
    every = max(1, steps // max(1, looks))
    curve, spent = [], 0.0
    for step, (x, y) in zip(range(steps), problem.batches, strict=False):
        if looks and step % every == 0:
            curve.append([step, problem.evaluate(*problem.validation)[0]])
        begin = time.process_time()
        loss = training_step(problem.model, optimizer, x, y)
        schedule.step()
        spent += time.process_time() - begin
        if not math.isfinite(loss):
            break
    final, accuracy = problem.evaluate(*problem.validation)
    final = final if math.isfinite(loss) else math.nan
    curve.append([step + 1, final])
    return {
        "curve": [[step, value if math.isfinite(value) else None] for step, value in curve],
        "loss": final if math.isfinite(final) else None,
        "accuracy": accuracy,
        "training_cpu_seconds": spent,
    }


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> float:
    """Take one step and return the loss before it."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def optimizer_for(run: Run, problem: Problem) -> tuple[torch.optim.Optimizer, int]:
    """Return the optimizer of a run, and how many weights (numbers) are on spheres."""
    kind = KINDS[run.kind]
    groups = _audit(run, problem).param_groups(problem.model, weight_decay=run.weight_decay)
    count = sum(p.numel() for g in groups if g["sphere"] is not None for p in g["params"])
    plain = [{key: value for key, value in g.items() if key != "sphere"} for g in groups]
    if run.space == "wrapped":
        return on_sphere(kind.base(plain, run.lr), groups), count
    if run.space == "plain":
        for group in plain:  # the usual split: matrices decay, gains and biases do not
            group["weight_decay"] = run.weight_decay if group["params"][0].ndim > 1 else 0.0
        return kind.base(plain, run.lr), 0
    if run.rotation is not None:
        groups = turning(groups, run.rotation)
    return kind.sphere(groups, run.lr), count


def turning(groups: list[dict[str, Any]], rotation: float) -> list[dict[str, Any]]:
    """Return param groups of which those on spheres turn by so many radians per step."""
    angle = {"lr": rotation, "lr_mode": "angle"}
    return [group if group["sphere"] is None else group | angle for group in groups]


def _audit(run: Run, problem: Problem) -> osp.Audit:
    """Ask once per process which weights of this architecture live on spheres."""
    if (run.kind, run.width) not in _AUDITS:
        _AUDITS[run.kind, run.width] = osp.audit(problem.model, (problem.validation[0][:8],))
    return _AUDITS[run.kind, run.width]


_AUDITS: dict[tuple[str, int], osp.Audit] = {}
TRAIN = Task("evidence", 2, train)
