"""Pages that a command writes beside its output."""

from collections.abc import Callable
from pathlib import Path

from onsphere.errors import OnsphereError


def check_page(path: Path) -> None:
    """Say before the work, not after it, that a page cannot be written."""
    from onsphere.report import page  # noqa: F401  # says which extra is missing

    if path.is_dir():
        raise OnsphereError(f"cannot write the page {str(path)!r}: it is a folder; name a file")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise OnsphereError(f"cannot write the page {str(path)!r}: {str(parent)!r} is no folder")


def write_page(write: Callable[[Path], object], path: Path) -> None:
    """Write a page, and turn what the file system says into one line."""
    try:
        write(path)
    except OSError as error:
        raise OnsphereError(
            f"cannot write the page {str(path)!r}: {error.strerror or error}"
        ) from error
