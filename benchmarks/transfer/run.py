"""One run: a network of a size, the number that is tuned, and a seed."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

import onsphere as osp
from benchmarks.evidence.problem import Problem
from benchmarks.evidence.run import follow, turning
from benchmarks.transfer.scale import KINDS, RATES, Method, Size
from onsphere.geometry import Sphere, VectorAxes
from onsphere.studies.engine.job import Cell, Config, Inputs, Outcome, Task

_INSIDE = ("blocks.", "convs.")  # where the hidden matrices are


@dataclass(frozen=True)
class Run:
    """How one network is trained.

    Args:
        kind: a key of :data:`~benchmarks.transfer.scale.KINDS`.
        method: what ``swept`` is.
        swept: the peak of the number that is tuned: a rate, or radians per step.
        lr: peak rate of all other weights: that of the small model.
        weight_decay: of matrices that are not on spheres: that of the small model.
        size: of network and training.
        seed: of the initial weights and the order of the data.
    """

    kind: str
    method: Method
    swept: float
    lr: float
    weight_decay: float
    size: Size
    seed: int

    @property
    def images(self) -> str:
        """The data set that its worker loads."""
        return KINDS[self.kind].images

    def cell(self, text: Cell) -> Cell:
        """Return the cell of this run; a GPT needs the cell of the text."""
        row, size = KINDS[self.kind], self.size
        wider, deeper, more = (
            getattr(size, axis) / getattr(row.size, axis) for axis in ("width", "depth", "batch")
        )
        cost = row.cost * size.steps * wider * deeper * more**0.6
        # With one rate for all weights, two methods are the same run.
        same = self.method == "hidden" and self.swept == self.lr
        one = replace(self, method="plain") if same or self.method == "plain" else self
        one = replace(one, lr=one.swept) if one.method == "plain" else one
        return Cell(TRAIN, asdict(one), (text,) if row.reads_text else (), cost=cost)


def train(config: Config, inputs: Inputs) -> Outcome:
    """Train, and measure the validation loss at the end."""
    run = Run(**{**config, "size": Size(**config["size"])})
    problem = KINDS[run.kind].make(run.size, run.seed, inputs)
    optimizer, held = optimizer_for(run, problem)
    result = follow(problem, optimizer, run.size.steps, looks=0)
    weights = sum(p.numel() for p in problem.model.parameters())
    return Outcome(result | {"on_spheres": held, "parameters": weights})


def optimizer_for(run: Run, problem: Problem) -> tuple[torch.optim.Optimizer, int]:
    """Return the optimizer of a run, and how many weights (numbers) are on spheres."""
    kind, model = KINDS[run.kind], problem.model
    if run.method in RATES:
        groups = plain_groups(model, run.weight_decay)
        for group in groups:
            inside = group.pop("hidden")
            group["lr"] = run.swept if inside or run.method == "plain" else run.lr
        return kind.base(groups, run.lr), 0
    groups = _groups(run, problem)
    count = sum(p.numel() for g in groups if g["sphere"] is not None for p in g["params"])
    return kind.sphere(turning(groups, run.swept), run.lr), count


def _groups(run: Run, problem: Problem) -> list[dict[str, Any]]:
    if run.method == "every":
        groups = plain_groups(problem.model, run.weight_decay)
        for group in groups:
            inside = group.pop("hidden")
            group["sphere"] = Sphere(VectorAxes(), invariant=False) if inside else None
            group["weight_decay"] = 0.0 if inside else group["weight_decay"]
        return groups
    fix = "maximal" if run.method == "maximal" else None
    audit = _audit(run, problem)
    return audit.param_groups(problem.model, weight_decay=run.weight_decay, fix=fix)


def hidden(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is a matrix between embedding and head, or a filter bank."""
    return parameter.ndim > 1 and name.startswith(_INSIDE)


def plain_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return param groups of hidden matrices, other matrices, and vectors, which do not decay."""
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        key = hidden(name, parameter), parameter.ndim > 1
        found.setdefault(key, []).append(parameter)
    return [
        {"params": some, "hidden": inside, "weight_decay": weight_decay if decays else 0.0}
        for (inside, decays), some in found.items()
    ]


def _audit(run: Run, problem: Problem) -> osp.Audit:
    """Ask once per process which weights of this architecture live on spheres."""
    key = run.kind, run.size.width, run.size.depth
    if key not in _AUDITS:
        _AUDITS[key] = osp.audit(problem.model, (problem.validation[0][:8],))
    return _AUDITS[key]


_AUDITS: dict[tuple[str, int, int], osp.Audit] = {}
TRAIN = Task("transfer", 1, train)
