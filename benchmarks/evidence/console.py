"""What a long benchmark prints: how far it is, and at its end the tables of its report."""

import time
from pathlib import Path

from rich.console import Console

from onsphere.report import Document, summary, table
from onsphere.studies.engine.runner import Progress


class Log:
    """One line per finished run."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        minutes = (time.monotonic() - self._start) / 60
        print(f"{minutes:.1f} min: {progress.cells_done}/{progress.cells} runs", flush=True)


def show(page: Document, written: Path, width: int) -> None:
    """Print what a report says, its tables, and where it lies.

    Args:
        page: the report.
        written: its file.
        width: of the tables, in characters.
    """
    console = Console(width=width)
    console.print(summary(page))
    for section in page.sections:
        for one in section.tables:
            console.print(table(one))
    console.print(f"Report: {written}", soft_wrap=True)
