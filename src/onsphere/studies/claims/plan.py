"""How large a study is: data, seeds, methods, and the numbers behind a size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from onsphere.studies.engine.job import Cell, Task
from onsphere.studies.setup.architectures import Architecture, architecture
from onsphere.studies.setup.network import LABELS, STUDIED
from onsphere.studies.setup.training import Training

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

    def snapshots(self, method: str, seed: int) -> list[Training]:
        """Return one plain run at a constant rate, ended at a tenth, a third and all of its steps.

        Equal seeds make the short runs beginnings of the long one, which is the recorded run of the
        claim ``growth``.
        """
        steps = self.scale.steps
        whole = self.training(method, seed, record=True)
        short = [replace(whole, record=False, steps=max(2, steps // part)) for part in (10, 3)]
        return [*short, whole]


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


def label(method: str) -> str:
    """Return how tables and figures call a method."""
    return LABELS[method]


def average(values: Sequence[float]) -> float:
    """Return the mean; nan for no values."""
    return sum(values) / len(values) if values else float("nan")


def worst(values: Sequence[float]) -> float:
    """Return the largest value, 0 for none."""
    return max(values, default=0.0)
