"""Write a document: the page, its figures as files, and the verdicts for machines."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from onsphere.errors import OnsphereError
from onsphere.report import Document, Figure, figures, html
from onsphere.report.drawing.palette import Palette, palette_of
from onsphere.studies.engine.process_pool import Workers


def publish(
    document: Document,
    folder: Path,
    *,
    jobs: int = 1,
    files: bool = True,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Write ``report.html`` and ``figures/*.{png,svg,pdf}`` into a folder.

    Args:
        document: what to write.
        folder: where; made when missing.
        jobs: worker processes for the files of figures.
        files: write these; the page holds its own pictures.
        progress: told how many files of figures are written, and how many there are.

    Returns:
        The path of the page.

    Raises:
        OnsphereError: the folder cannot be written.
    """
    figures = [figure for section in document.sections for figure in section.figures]
    save = partial(_save, folder=folder / "figures", palette=palette_of(figures))
    try:
        with Workers(jobs) as pool:  # they draw beside this process, which writes the page
            saving = [pool.submit(save, figure) for figure in figures] if files else []
            written = html.write(document, folder / "report.html")
            for done, future in enumerate(saving, 1):
                future.result()
                progress(done, len(saving))
    except OSError as error:
        raise OnsphereError(
            f"cannot write to the output folder {str(folder)!r} ({error.strerror}); choose another "
            "with --out"
        ) from None
    return written


def _save(figure: Figure, folder: Path, palette: Palette) -> None:
    figures.save(figure, folder, palette)
