"""What an attacked classifier's page says: how many examples stand, can one trust it, and why."""

from collections.abc import Iterator, Mapping, Sequence

from onsphere.report.document import Document, Figure, Panel, Section, Series
from onsphere.report.number import number
from onsphere.robustness.amplification.html import sections as gain_sections
from onsphere.robustness.amplification.result import Amplification
from onsphere.robustness.evaluation.result import Evaluation
from onsphere.robustness.evaluation.text import tables

_ROBUST = (
    "An example counts as robust when no attack breaks it: the worst case over all attacks, each "
    "example by itself. The number is an upper bound; the checks ask whether it is a good one."
)
_CAPTION = (
    "Accuracy after each attack, the former ones included; bars are Wilson's 95 % intervals over "
    "examples. Each attack is shown what the former left standing."
)


def document(
    evaluation: Evaluation,
    amplification: Amplification | None,
    *,
    model: str,
    data: str,
    command: str = "",
    provenance: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
) -> Document:
    """Return what the page of an attacked classifier says.

    Args:
        evaluation: its robust accuracy, with checks.
        amplification: what its layers do to perturbations; ``None`` if that was not measured.
        model: its name.
        data: the name of the examples.
        command: how to make the page again.
        provenance: more that is needed to make it again.
        warnings: what a reader must know before trusting the page.
    """
    clean, robust = evaluation.clean_accuracy, evaluation.robust_accuracy
    settings = evaluation.settings
    gains = [] if amplification is None else list(gain_sections(amplification, command))
    return Document(
        title=f"{model} under attack",
        summary=(
            f"{evaluation.examples} examples of {data}, {settings['norm']} ball of radius "
            f"{number(settings['eps'])}: accuracy {clean}, robust accuracy {robust}."
        ),
        sections=[*_robustness(evaluation, command), *gains],
        provenance={
            **(provenance or {}),
            "norm": str(settings["norm"]),
            "eps": repr(settings["eps"]),
            "bounds": "{} to {}".format(*settings["bounds"]),
            "attacks": ", ".join(settings["attacks"]),
            "seed": str(settings["seed"]),
        },
        warnings=[*warnings, *(f"{c.name}: {c.meaning}" for c in evaluation.suspicious)],
    )


def _robustness(evaluation: Evaluation, command: str) -> Iterator[Section]:
    robust = evaluation.robust_accuracy
    found = [f"{c.name}: {c.finding}" for c in evaluation.checks if c.finding != "passed"]
    passed = sum(c.finding == "passed" for c in evaluation.checks)
    yield Section(
        name="robustness",
        title="Robust accuracy, and whether to trust it",
        statement=_ROBUST,
        figure_of_merit=f"robust accuracy {robust}",
        findings=[
            f"{evaluation.clean_accuracy.count} of {evaluation.examples} examples are right "
            f"without an attack, {robust.count} in the worst case.",
            *(
                [f"{passed} of {len(evaluation.checks)} checks passed."]
                if evaluation.checks
                else []
            ),
            *found,
            *evaluation.notes,
        ],
        figures=[_accuracies(evaluation)],
        tables=tables(evaluation),
        command=command,
    )


def _accuracies(evaluation: Evaluation) -> Figure:
    shares = {"no attack": evaluation.clean_accuracy, **evaluation.accuracies}
    ends = [share.interval for share in shares.values()]
    series = Series(
        "accuracy",
        range(len(shares)),
        [share.value for share in shares.values()],
        [low for low, _ in ends],
        [high for _, high in ends],
        style="both",
    )
    panel = Panel("", "after", "accuracy", [series], categories=list(shares), y_limits=(0.0, 1.0))
    return Figure("accuracies", "What each attack leaves standing", _CAPTION, [panel])
