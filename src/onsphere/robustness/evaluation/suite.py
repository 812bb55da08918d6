"""The attacks of an evaluation by name, and what each may spend."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from onsphere.errors import nearest
from onsphere.robustness.attacks.auto_pgd import apgd, apgd_targeted
from onsphere.robustness.attacks.fab import fab
from onsphere.robustness.attacks.pgd import Model
from onsphere.robustness.attacks.square import square_attack
from onsphere.robustness.attacks.threat_model import Threat
from onsphere.robustness.evaluation.result import EvaluationError

# How generously progress is extrapolated before a hopeless example is given up.
_ASCENT, _APPROACH, _SEARCH = 32.0, 8.0, 3.0


@dataclass(frozen=True)
class Budget:
    """What the attacks may spend on one example.

    Args:
        steps: gradient evaluations per run and target; 100 in AutoAttack.
        targets: how many of the wrong classes targeted attacks aim at; 9 in AutoAttack.
        queries: of Square; 5,000 in AutoAttack.
        restarts: random starts of Auto-PGD; 1 in AutoAttack.
        early_stopping: stop an attack on an example early where its own progress, extrapolated
            generously, does not reach success: on a robust network this saves more than half of
            the time. ``False`` spends everything on every example.
        batch_size: examples in one call of the model that takes gradients; Square, which takes
            none, has four times as many. On a CPU small batches stay in the cache; on a GPU take
            more.

    Raises:
        EvaluationError: a number below 1.

    Example:
        >>> Budget(steps=20).targets
        9
    """

    steps: int = 100
    targets: int = 9
    queries: int = 5000
    restarts: int = 1
    early_stopping: bool = True
    batch_size: int = 128

    def together(self, attack: str) -> int:
        """How many examples an attack takes at a time.

        Example:
            >>> Budget(batch_size=100).together("square")
            400
        """
        return self.batch_size * (4 if attack in WITHOUT_GRADIENTS else 1)

    def __post_init__(self) -> None:
        for name in ("steps", "targets", "queries", "restarts", "batch_size"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"{name} is at least 1, got {getattr(self, name)}")


Named = Callable[[Model, Tensor, Tensor, Threat, Budget, torch.Generator], Tensor]


def _apgd(loss: str) -> Named:
    def attack(
        model: Model, x: Tensor, y: Tensor, threat: Threat, budget: Budget, seeded: torch.Generator
    ) -> Tensor:
        return apgd(
            model, x, y, eps=threat.eps, norm=threat.norm, bounds=threat.bounds, loss=loss,
            steps=budget.steps, restarts=budget.restarts, generator=seeded,
        )  # fmt: skip

    return attack


def _apgd_targeted(
    model: Model, x: Tensor, y: Tensor, threat: Threat, budget: Budget, seeded: torch.Generator
) -> Tensor:
    return apgd_targeted(
        model, x, y, eps=threat.eps, norm=threat.norm, bounds=threat.bounds, steps=budget.steps,
        targets=budget.targets, restarts=budget.restarts, batch_size=budget.batch_size,
        generator=seeded,
        early_stopping_factor=_ASCENT if budget.early_stopping else None,
    )  # fmt: skip


def _fab(
    model: Model, x: Tensor, y: Tensor, threat: Threat, budget: Budget, _: torch.Generator
) -> Tensor:
    return fab(
        model, x, y, norm=threat.norm, bounds=threat.bounds, steps=budget.steps,
        targets=budget.targets, batch_size=budget.batch_size, eps=threat.eps,
        early_stopping_factor=_APPROACH if budget.early_stopping else None,
    )  # fmt: skip


def _square(
    model: Model, x: Tensor, y: Tensor, threat: Threat, budget: Budget, seeded: torch.Generator
) -> Tensor:
    return square_attack(
        model, x, y, eps=threat.eps, norm=threat.norm, bounds=threat.bounds,
        queries=budget.queries, generator=seeded,
        early_stopping_factor=_SEARCH if budget.early_stopping else None,
    )  # fmt: skip


ATTACKS: Mapping[str, Named] = MappingProxyType(
    {
        "apgd-ce": _apgd("tempered_cross_entropy"),
        "apgd-dlr": _apgd("dlr"),
        "apgd-t": _apgd_targeted,
        "fab-t": _fab,
        "square": _square,
    }
)
"""The attacks, the cheap ones first: an evaluation runs them in this order."""

WITHOUT_GRADIENTS = frozenset({"square"})

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
        "quick": ("apgd-ce", "apgd-t"),
        "rand": ("apgd-ce", "apgd-dlr"),
    }
)
"""Sets of attacks by name; ``"standard"`` has the members of standard AutoAttack, ``"rand"`` those
of its version for randomized defences."""


def chosen(attacks: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of attacks in the order of :data:`ATTACKS`.

    Args:
        attacks: the name of a suite, of an attack, or names of attacks.

    Raises:
        EvaluationError: an unknown name, or none.

    Example:
        >>> chosen("quick"), chosen(["square", "apgd-ce"])
        (('apgd-ce', 'apgd-t'), ('apgd-ce', 'square'))
    """
    one = isinstance(attacks, str) or not isinstance(attacks, Sequence)
    names = [str(name).lower() for name in ((attacks,) if one else attacks)]
    if one:
        names = list(SUITES.get(names[0], names))
    for name in names:
        if name not in ATTACKS:
            raise EvaluationError(
                f"unknown attack {name!r}{nearest(str(name), [*SUITES, *ATTACKS])}"
            )
    if not names:
        raise EvaluationError(f"name at least one attack of: {', '.join([*SUITES, *ATTACKS])}")
    return tuple(name for name in ATTACKS if name in names)
