"""How large a study is: data, seeds, methods, and the numbers behind a size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from onsphere.studies.engine.job import Cell, Task
from onsphere.studies.setup.architectures import Architecture, architecture
from onsphere.studies.setup.network import LABELS, STUDIED
from onsphere.studies.setup.training import Training
from onsphere.studies.setup.training_group import group_cell

Size = Literal["quick", "default", "full"]
Results = Mapping[str, dict[str, Any]]
"""Records by the key of their cell."""


@dataclass(frozen=True)
class Plan:
    """How large a study is.

    Args:
        data: name of the data set.
        seeds: seeds of everything that is trained.
        size: ``"quick"`` shows that it runs, ``"default"`` decides what minutes can decide,
            ``"full"`` asks every method.
        looks: how many seeds there are at each look; without any, all of them at one look.
        network: a name of :data:`~onsphere.studies.setup.architectures.ARCHITECTURES`.
    """

    data: str = "digits"
    seeds: tuple[int, ...] = (0, 1, 2)
    size: Size = "default"
    looks: tuple[int, ...] = ()
    network: str = "small"

    def __post_init__(self) -> None:
        if not self.looks:
            object.__setattr__(self, "looks", (len(self.seeds),))

    @property
    def scale(self) -> "Scale":
        """The numbers behind the size."""
        return SCALES[self.size]

    @property
    def architecture(self) -> Architecture:
        """What is trained."""
        return architecture(self.network)

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method that makes sense in the network, in the order of the tables."""
        return self.architecture.methods

    @property
    def normalized(self) -> tuple[str, ...]:
        """Every method but ``none``."""
        return tuple(key for key in self.methods if key != "none")

    @property
    def panel(self) -> tuple[str, ...]:
        """The methods whose training is compared."""
        return self._present(self.scale.panel)

    @property
    def attacked(self) -> tuple[str, ...]:
        """The methods whose networks are attacked, which costs most."""
        return self._present(self.scale.attacked)

    @property
    def own_spheres(self) -> tuple[str, ...]:
        """The panel, in networks whose hidden weights all have spheres of their own."""
        return self.panel if self.architecture.own_spheres else ()

    def _present(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Return which of the methods the network has, or as many others where it has none."""
        own = tuple(method for method in wanted if method in self.methods)
        return own or self.normalized[: len(wanted)]

    @property
    def exact_seeds(self) -> tuple[int, ...]:
        """Seeds of what must hold for each of them: identities."""
        return self.seeds[: min(self.looks[0], self.scale.exact)]

    @property
    def first_seeds(self) -> tuple[int, ...]:
        """Seeds that every measurement has, for pictures and tables."""
        return self.seeds[: min(self.looks[0], self.scale.few)]

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

    def beside(self, seed: int) -> tuple[int, ...]:
        """Return the seeds that are asked together with a seed, itself among them.

        Their networks are trained in one stack. Which they are does not depend on what earlier
        looks have left open.
        """
        if not self.architecture.stacks:
            return (seed,)
        several = len(self.looks) > 1
        ends = [0, *self.looks] if several else [0, self.scale.few, len(self.seeds)]
        place = self.seeds.index(seed)
        first = max(end for end in ends if end <= place)
        return self.seeds[first : min(end for end in ends if end > place)]

    def together(
        self, seed: int, of: Callable[[int], Sequence[Training]], *, keep: bool = False
    ) -> tuple[Cell, int]:
        """Return the cell that trains networks of a seed, and of those beside it.

        Args:
            seed: whose networks are wanted.
            of: the trainings of a seed: as many for each.
            keep: save the networks, for cells that build on them.

        Returns:
            The cell, and the number of the seed's first network in it.
        """
        seeds = self.beside(seed)
        group = [training for one in seeds for training in of(one)]
        each = len(group) // len(seeds)
        return group_cell(group, keep=keep), each * seeds.index(seed)


@dataclass(frozen=True)
class Scale:
    """The numbers behind a size.

    Args:
        seeds: how many seeds, unless the user says.
        few: how many of them are asked where few show it.
        exact: how many of them check an identity.
        looks: how many seeds there are at each look, where seeds are added until decided.
        panel: methods whose training is compared.
        attacked: methods whose networks are attacked.
        steps: of the common training.
        width: of the network.
        stability_steps: steps of each run of the stability study.
        attack_steps: steps of Auto-PGD for each loss.
        images: test images under attack, at most.
        exact_steps: float64 steps over which the recursions are checked.
    """

    seeds: int
    few: int
    exact: int
    looks: tuple[int, ...]
    panel: tuple[str, ...]
    attacked: tuple[str, ...]
    steps: int
    width: int
    stability_steps: int
    attack_steps: int
    images: int
    exact_steps: int


_ALL = tuple(key for key in STUDIED if key != "none")

SCALES: dict[Size, Scale] = {
    "quick": Scale(1, 1, 1, (3, 6), ("bn", "wn"), ("bn",), 50, 8, 20, 5, 50, 10),
    "default": Scale(
        8, 5, 1, (4, 8, 16, 24, 32), ("bn", "ln", "wn"), ("bn",), 300, 8, 90, 10, 1000, 30
    ),
    "full": Scale(20, 6, 3, (8, 16, 24, 32, 40), _ALL, _ALL, 2000, 16, 1000, 50, 1000, 200),
}
"""The numbers behind every size."""


def on_trained(plan: Plan, task: Task, method: str, seed: int, cost: float) -> Cell:
    """Return the cell that measures the shared plain network of a method and a seed."""
    training = plan.trained(method, seed).cell()
    return Cell(task, {"training": training.config}, (training,), cost)


def on_recorded(
    plan: Plan, task: Task, method: str, seed: int, cost: float, **changes: Any
) -> Cell:
    """Return the cell that measures a recorded run at a constant rate; with changes of the run."""

    def recorded(one: int) -> list[Training]:
        return [plan.training(method, one, record=True, **changes)]

    group, number = plan.together(seed, recorded, keep=True)
    config = {"training": asdict(*recorded(seed)), "member": number}
    return Cell(task, config, (group,), cost)


def label(method: str) -> str:
    """Return how tables and figures call a method."""
    return LABELS[method]


def average(values: Sequence[float]) -> float:
    """Return the mean; nan for no values."""
    return sum(values) / len(values) if values else float("nan")


def worst(values: Sequence[float]) -> float:
    """Return the largest value, 0 for none."""
    return max(values, default=0.0)
