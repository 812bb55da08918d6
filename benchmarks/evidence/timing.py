"""Step times of the spaces, alternating, so that a machine whose speed drifts is fair."""

from collections.abc import Callable

from benchmarks.evidence.problem import KINDS
from benchmarks.evidence.run import Run, optimizer_for, training_step
from benchmarks.pairing import pair
from onsphere.studies.engine.job import Config, Inputs, Outcome, Task

_PAIRS = 31


def measure(config: Config, inputs: Inputs) -> Outcome:
    """Time whole training steps and optimizer steps against the base optimizer's."""
    runs = {space: Run(**settings) for space, settings in config.items()}
    steps = {space: _steps(run, inputs) for space, run in runs.items()}
    result = {}
    for space in [space for space in runs if space != "plain"]:
        for number, what in enumerate(("training step", "optimizer step")):
            found = pair(what, "plain", steps[space][number], steps["plain"][number], pairs=_PAIRS)
            result[f"{space}, {what}"] = {
                "ours_ms": found.ours_ms,
                "ratio": found.ratio,
                "low": found.low,
                "high": found.high,
            }
    return Outcome(result)


def _steps(run: Run, inputs: Inputs) -> tuple[Callable[[], object], Callable[[], object]]:
    problem = KINDS[run.kind].make(run.width, run.batch, run.seed, inputs)
    optimizer, _ = optimizer_for(run, problem)
    for group in optimizer.param_groups:
        group["lr"] *= 1e-6  # hundreds of steps on one batch: nothing may diverge
    x, y = next(problem.batches)

    def whole() -> object:
        return training_step(problem.model, optimizer, x, y)

    whole()  # gradients for the optimizer's own step
    return whole, optimizer.step


TIMING = Task("evidence: step time", 2, measure)
