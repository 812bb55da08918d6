"""Write a document: the page, its figures as files, and the verdicts for machines."""

from functools import partial
from pathlib import Path

from onsphere.errors import OnsphereError
from onsphere.report import Document, Figure, figures, html
from onsphere.report.palette import Palette, palette_of
from onsphere.studies.engine.process_pool import Workers


def publish(document: Document, folder: Path, *, jobs: int = 1) -> Path:
    """Write ``report.html`` and ``figures/*.{png,svg,pdf}`` into a folder.

    Args:
        document: what to write.
        folder: where; made when missing.
        jobs: worker processes for the figures.

    Returns:
        The path of the page.

    Raises:
        OnsphereError: the folder cannot be written.
    """
    figures = [figure for section in document.sections for figure in section.figures]
    try:
        written = html.write(document, folder / "report.html")
        with Workers(jobs) as pool:
            save = partial(_save, folder=folder / "figures", palette=palette_of(figures))
            list(pool.map(save, figures))
    except OSError as error:
        raise OnsphereError(
            f"cannot write to the output folder {str(folder)!r} ({error.strerror}); choose another "
            "with --out"
        ) from None
    return written


def _save(figure: Figure, folder: Path, palette: Palette) -> None:
    figures.save(figure, folder, palette)
