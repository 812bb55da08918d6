"""Several trainings of one method as one cell, trained together."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache

from torch import Tensor

from onsphere.studies.engine.job import Cell, Config, Inputs, Outcome, Task
from onsphere.studies.setup.ensemble import is_stackable, train_ensemble
from onsphere.studies.setup.training import Training


def run(config: Config, inputs: Inputs) -> Outcome:
    """Train the group; results in a list, tensors under the number of their network."""
    outcomes = train_ensemble([Training(**one) for one in config["trainings"]], inputs.images)
    tensors: dict[str, Tensor] = {}
    if config["keep"]:
        for i, outcome in enumerate(outcomes):
            tensors |= {f"{i}.{name}": value for name, value in outcome.tensors.items()}
    return Outcome({"trained": [outcome.result for outcome in outcomes]}, tensors)


TRAIN_TOGETHER = Task("train.together", 3, run)


def group_cell(trainings: Sequence[Training], *, keep: bool = False) -> Cell:
    """Return the cell that trains these networks.

    Args:
        trainings: of one method.
        keep: save the networks, for cells that build on them.
    """
    return _group_cell(tuple(trainings), keep)


@lru_cache(maxsize=1024)
def _group_cell(trainings: tuple[Training, ...], keep: bool) -> Cell:
    """Make the cell once: every seed of a group asks for it, and its key takes a while."""
    config: Config = {"trainings": [asdict(training) for training in trainings], "keep": keep}
    return Cell(TRAIN_TOGETHER, config, cost=cost_of(trainings))


def cost_of(trainings: Sequence[Training]) -> float:
    """Return rough seconds on one core of training these networks together."""
    return sum(one.cell().cost * (0.4 if is_stackable(one) else 1.0) for one in trainings)


def member(inputs: Inputs, number: int) -> Inputs:
    """Return what a cell that builds on one network of a group would be given."""
    prefix = f"{number}."
    tensors = {
        name.removeprefix(prefix): value
        for name, value in inputs.tensors[0].items()
        if name.startswith(prefix)
    }
    return Inputs(inputs.images, (inputs.records[0]["trained"][number],), (tensors,))
