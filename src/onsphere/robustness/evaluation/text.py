"""Robust accuracy in a terminal: a table of attacks, and one of the checks."""

from typing import TYPE_CHECKING

from rich.text import Text

from onsphere.report import Table, plain_text, table
from onsphere.report.number import number

if TYPE_CHECKING:  # the result prints itself by these functions
    from onsphere.robustness.evaluation.result import Evaluation


def plain(found: "Evaluation") -> str:
    """Return the tables, and what speaks against the number."""
    warnings = [Text(f"! {check.name}: {check.meaning}") for check in found.suspicious]
    notes = map(Text, found.notes)
    return plain_text(*map(table, tables(found)), *notes, *warnings, width=100)


def tables(found: "Evaluation") -> tuple[Table, ...]:
    """Return what was found as tables for a report: accuracies, then checks."""
    right = found.clean_accuracy
    rows = [["no attack", right.count, None, right.value, *right.interval, None]]
    for stage, share in zip(found.stages, found.accuracies.values(), strict=True):
        rows.append(
            [stage.attack, share.count, stage.broken, share.value, *share.interval, stage.seconds]
        )
    columns = ("after", "right", "broken", "accuracy", "from", "to", "seconds")
    radius = f"{found.settings['norm']}, eps = {number(found.settings['eps'])}"
    accuracies = Table(
        f"Robust accuracy of {found.examples} examples, {radius}",
        columns,
        rows,
        "From, to: Wilson's 95 % interval. Each attack sees what the former left standing.",
    )
    checks = [[c.name, c.finding, c.measured, c.meaning] for c in found.checks]
    headings = ("can it be trusted?", "finding", "measured", "what was measured")
    return (accuracies, Table("", headings, checks)) if checks else (accuracies,)
