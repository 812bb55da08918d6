"""What an evaluation found: a frozen record, a table for people, JSON for machines."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

from onsphere._utils.files import write_whole
from onsphere.errors import OnsphereError
from onsphere.report.number import number
from onsphere.robustness.evaluation import text

FORMAT = 1
"""Version of the file format; raised when an older reader would misunderstand a file."""

Finding = Literal["passed", "noted", "suspicious", "not run"]

WRONG, ROBUST = "wrong", "robust"
"""Fates of examples that no attack broke: wrong from the start, or still right."""

_NORMAL_95 = 1.959963984540054


class EvaluationError(OnsphereError, ValueError):
    """What was given cannot be evaluated."""


@dataclass(frozen=True)
class Proportion:
    r"""A count out of a total, with Wilson's 95 % interval.

    :math:`\bigl(\hat p + z^2/2n \pm z\sqrt{\hat p(1-\hat p)/n + z^2/4n^2}\bigr)/(1 + z^2/n)`: the
    interval for the whole population when the examples are a random sample of it.

    Args:
        count: how many.
        total: of how many; at least 1.

    Example:
        >>> print(Proportion(40, 50))
        0.8 [0.6696, 0.8876]

    Source: Wilson, 1927 (JASA 22), equation 8.
    """

    count: int
    total: int

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the interval."""
        n, p, z = self.total, self.value, _NORMAL_95
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        middle = p + z * z / (2 * n)
        return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{number(self.value)} [{number(low)}, {number(high)}]"


@dataclass(frozen=True)
class Stage:
    """One attack on the examples that the former ones left standing.

    Attributes:
        attack: its name.
        attacked: how many examples it was shown.
        broken: how many of them it broke.
        seconds: how long it took; equal evaluations may differ in it.
    """

    attack: str
    attacked: int
    broken: int
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class Check:
    """One reason to trust the number, or not to.

    Attributes:
        name: what was checked.
        finding: ``"passed"``, ``"noted"`` (unusual, but nothing against the number),
            ``"suspicious"`` or ``"not run"``.
        measured: the number behind it.
        meaning: what the number is, and what a suspicious one says.
    """

    name: str
    finding: Finding
    measured: float | None
    meaning: str


@dataclass(frozen=True)
class Evaluation:
    """Robust accuracy in the worst case of several attacks, per example.

    Attributes:
        fates: of every example in order: the name of the attack that broke it, ``"wrong"`` where
            the model was wrong from the start, or ``"robust"``.
        stages: the attacks in the order in which they ran.
        checks: reasons to trust the number, or not to.
        settings: radius, norm, bounds, seed and budgets; ``outputs`` says whether the model gave
            ``"logits"`` or ``"probabilities"``, ``draws`` and ``average`` of what the mean was.

    Example:
        >>> stages = (Stage("apgd-ce", 9, 4, 0.1), Stage("square", 5, 0, 0.2))
        >>> fates = ("wrong", *["apgd-ce"] * 4, *["robust"] * 5)
        >>> found = Evaluation(fates, stages, (), {"eps": 0.1, "norm": "linf"})
        >>> found.clean_accuracy.value, found.robust_accuracy.value
        (0.9, 0.5)
    """

    fates: tuple[str, ...]
    stages: tuple[Stage, ...]
    checks: tuple[Check, ...]
    settings: Mapping[str, Any]

    @property
    def examples(self) -> int:
        """How many examples there were."""
        return len(self.fates)

    @property
    def clean_accuracy(self) -> Proportion:
        """Share of examples that are right without an attack."""
        return Proportion(sum(fate != WRONG for fate in self.fates), self.examples)

    @property
    def robust_accuracy(self) -> Proportion:
        """Share of examples that no attack breaks."""
        return Proportion(sum(fate == ROBUST for fate in self.fates), self.examples)

    @property
    def accuracies(self) -> dict[str, Proportion]:
        """Robust accuracy after each attack, the former ones included."""
        return {
            stage.attack: Proportion(stage.attacked - stage.broken, self.examples)
            for stage in self.stages
        }

    @property
    def suspicious(self) -> tuple[Check, ...]:
        """The checks that speak against the number."""
        return tuple(check for check in self.checks if check.finding == "suspicious")

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of how the model was taken, one sentence each."""
        said = []
        if self.settings.get("outputs") == "probabilities":
            said.append("Outputs sum to one: taken for probabilities, their logarithms attacked.")
        draws = self.settings.get("draws", 1)
        if draws > 1:
            said.append(
                f"Attacked and judged is the mean of {self.settings['average']} over {draws} draws."
            )
        return tuple(said)

    def __repr__(self) -> str:
        return (
            f"<Evaluation of {self.examples} examples: accuracy {self.clean_accuracy.value:.3g}, "
            f"{self.robust_accuracy.value:.3g} under attack, "
            f"{len(self.suspicious)} of {len(self.checks)} checks suspicious; print() shows all>"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        return text.plain(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold, the accuracies among it."""
        return {
            "format": FORMAT,
            "examples": self.examples,
            "clean_accuracy": _plain(self.clean_accuracy),
            "robust_accuracy": _plain(self.robust_accuracy),
            **{k: v for k, v in asdict(self).items() if k != "settings"},
            "settings": dict(self.settings),
        }

    def to_json(self, path: str | Path) -> Path:
        """Write the evaluation to a file that :meth:`from_json` reads back; return the path.

        The file is written whole or not at all.
        """
        write_whole(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        return Path(path)

    @classmethod
    def from_json(cls, path: str | Path) -> "Evaluation":
        """Read an evaluation that :meth:`to_json` wrote.

        Raises:
            EvaluationError: the file holds something else, or another version's evaluation.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, EvaluationError) as error:
            raise EvaluationError(f"{path} does not hold an evaluation: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Evaluation":
        """Undo :meth:`to_dict`.

        Raises:
            EvaluationError: the data is something else, or another version's evaluation.
        """
        found = data.get("format") if isinstance(data, Mapping) else None
        if found != FORMAT:
            raise EvaluationError(
                f"an evaluation of format {found!r} cannot be read; this version reads format "
                f"{FORMAT}: evaluate again"
            )
        try:
            checks = tuple(Check(**check) for check in data["checks"])
            stages = tuple(Stage(**stage) for stage in data["stages"])
            settings = {**data["settings"], "bounds": tuple(data["settings"]["bounds"])}
            if any(check.finding not in get_args(Finding) for check in checks):
                raise ValueError("an unknown finding")
            return cls(tuple(data["fates"]), stages, checks, settings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(
                f"this is no evaluation: {type(error).__name__}: {error}"
            ) from error


def _plain(share: Proportion) -> dict[str, Any]:
    low, high = share.interval
    return {"value": share.value, "low": low, "high": high}
