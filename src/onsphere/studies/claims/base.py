"""A claim: what the paper says, what would show it, and how measurements become a verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from onsphere.report.document import Figure, Section, Table, Verdict
from onsphere.studies.engine.job import Cell, Task
from onsphere.studies.setup.architectures import Architecture, architecture
from onsphere.studies.setup.network import LABELS
from onsphere.studies.setup.training import DECAY, Training

Size = Literal["quick", "default", "full"]
Results = Mapping[str, dict[str, Any]]
"""Records by the key of their cell."""


@dataclass(frozen=True)
class Plan:
    """How large a study is.

    Args:
        data: name of the data set.
        network: a name of :data:`~onsphere.studies.setup.architectures.ARCHITECTURES`.
        seeds: seeds of everything that is trained.
        size: ``"quick"`` shows that it runs, ``"default"`` gives verdicts in minutes,
            ``"full"`` is meant to settle them.
    """

    data: str = "digits"
    seeds: tuple[int, ...] = (0, 1, 2)
    size: Size = "default"
    network: str = "small"

    @property
    def architecture(self) -> Architecture:
        """What is trained."""
        return architecture(self.network)

    @property
    def scale(self) -> "Scale":
        """The numbers behind the size."""
        return SCALES[self.size]

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method that makes sense in the network, in the order of the tables."""
        return self.architecture.methods

    @property
    def normalized(self) -> tuple[str, ...]:
        """Every method but ``none``."""
        return tuple(key for key in self.methods if key != "none")

    def training(self, method: str, seed: int, **changes: Any) -> Training:
        """Return the study's common training, with changes."""
        common = Training(
            self.data,
            method,
            steps=self.scale.steps,
            width=self.architecture.width or self.scale.width,
            seed=seed,
            network=self.network,
        )
        return replace(common, **changes)

    def trained(self, method: str, seed: int, **changes: Any) -> Training:
        """Return the network that claims share, with a cosine schedule; with changes."""
        return self.training(method, seed, schedule="cosine", lr=0.1, **changes)

    def variants(self, method: str) -> tuple[str, ...]:
        """Return the variants that make sense for a method: no sphere without normalization."""
        return tuple(VARIANTS) if method != "none" else ("plain", "decay")


@dataclass(frozen=True)
class Scale:
    """The numbers behind a size.

    Args:
        seeds: how many seeds, unless the user says.
        steps: of the common training.
        width: of the network.
        rates: decades and rates per decade of the stability study: (lowest exponent, highest,
            rates per decade).
        stability_steps: steps of each of its runs.
        attacked: how many test images are attacked.
        attack_steps: steps of PGD.
        restarts: random restarts of PGD.
        exact_steps: float64 steps over which the recursions are checked.
        auto: test images under Auto-PGD, and its steps per loss and target.
    """

    seeds: int
    steps: int
    width: int
    rates: tuple[int, int, int]
    stability_steps: int
    attacked: int
    attack_steps: int
    restarts: int
    exact_steps: int
    auto: tuple[int, int]


SCALES: dict[Size, Scale] = {
    "quick": Scale(1, 50, 8, (-3, 1, 1), 20, 50, 5, 1, 10, (20, 5)),
    "default": Scale(3, 300, 8, (-3, 1, 2), 90, 200, 10, 1, 50, (100, 20)),
    "full": Scale(10, 2000, 16, (-4, 2, 3), 1000, 500, 50, 3, 200, (500, 100)),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": DECAY},
    "sphere": {"space": "sphere"},
}
"""The variants of the common training, as changes of it."""


@dataclass(frozen=True)
class Judgement:
    """What the measurements of one claim say; the rest of its section is known beforehand."""

    verdict: Verdict
    figure_of_merit: str
    findings: Sequence[str] = ()
    conditions: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Args:
        name: on the command line.
        title: a few words.
        statement: the claim as a sentence, with its source.
        prediction: what theory says should be measured.
        threshold: the rule for the verdict, written before the measurement.
        cells: what has to be computed for a plan.
        judge: turns the records into a judgement.
        on_request: it is run only when it is named.
        own_spheres: it speaks of weights that each live on spheres of their own, and makes no
            sense in a network without.
    """

    name: str
    title: str
    statement: str
    prediction: str
    threshold: str
    cells: Callable[[Plan], list[Cell]]
    judge: Callable[[Plan, Results], Judgement]
    on_request: bool = False
    own_spheres: bool = False

    def section(self, plan: Plan, results: Results, command: str) -> Section:
        """Return the claim's section of the report, from records alone."""
        judged = self.judge(plan, results)
        return Section(
            name=self.name,
            title=self.title,
            statement=self.statement,
            prediction=self.prediction,
            threshold=self.threshold,
            verdict=judged.verdict,
            figure_of_merit=judged.figure_of_merit,
            findings=judged.findings,
            conditions=judged.conditions,
            figures=judged.figures,
            tables=judged.tables,
            command=command,
        )


def on_trained(
    plan: Plan, task: Task, methods: Sequence[str], cost: float
) -> dict[tuple[str, int], Cell]:
    """Return the cells that measure the shared plain networks, by method and seed."""
    cells = {}
    for method in methods:
        for seed in plan.seeds:
            training = plan.trained(method, seed).cell()
            cells[method, seed] = Cell(task, {"training": training.config}, (training,), cost)
    return cells


def label(method: str) -> str:
    """Return how tables and figures call a method."""
    return LABELS[method]


def average(values: Sequence[float]) -> float:
    """Return the mean; nan for no values."""
    return sum(values) / len(values) if values else float("nan")


def worst(values: Sequence[float]) -> float:
    """Return the largest value, 0 for none."""
    return max(values, default=0.0)
