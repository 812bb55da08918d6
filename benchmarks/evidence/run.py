"""One run: a task, a space, its rates and a seed."""

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

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

    def cell(self, *needs: Cell) -> Cell:
        """Return the cell of this run; a GPT needs the cell of the text."""
        return Cell(TRAIN, asdict(self), needs, cost=self.steps * KINDS[self.kind].cost)

    def factor(self, step: int) -> float:
        """Return what the peak rates are multiplied by at a step, counted from 0."""
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup))) / 2


def train(config: Config, inputs: Inputs) -> Outcome:
    """Train, and look at the validation loss now and then; ``None`` is a loss without a number."""
    run = Run(**config)
    problem = KINDS[run.kind].make(run.width, run.batch, run.seed, inputs)
    optimizer, on_spheres = optimizer_for(run, problem)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, run.factor)
    every, curve, spent, start = max(1, run.steps // _LOOKS), [], 0.0, time.process_time()
    for step, (x, y) in zip(range(run.steps), problem.batches, strict=False):
        if step % every == 0:
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
    test_loss, test_accuracy = problem.evaluate(*problem.test)
    return Outcome(
        {
            "curve": [[step, value if math.isfinite(value) else None] for step, value in curve],
            "loss": final if math.isfinite(final) else None,
            "accuracy": accuracy,
            "test_loss": test_loss if math.isfinite(test_loss) else None,
            "test_accuracy": test_accuracy,
            "on_spheres": on_spheres,
            "parameters": sum(p.numel() for p in problem.model.parameters()),
            "training_cpu_seconds": spent,
            "cpu_seconds": time.process_time() - start,
        }
    )


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
    if run.space == "rotation":
        for group in groups:
            if group["sphere"] is not None:
                group |= {"lr": run.rotation, "lr_mode": "angle"}
    return kind.sphere(groups, run.lr), count


def _audit(run: Run, problem: Problem) -> osp.Audit:
    """Ask once per process which weights of this architecture live on spheres."""
    if (run.kind, run.width) not in _AUDITS:
        _AUDITS[run.kind, run.width] = osp.audit(problem.model, (problem.validation[0][:8],))
    return _AUDITS[run.kind, run.width]


_AUDITS: dict[tuple[str, int], osp.Audit] = {}
TRAIN = Task("evidence", 2, train)
