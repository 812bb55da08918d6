"""Files that a command writes: what stands in the way is said in one line, before the work."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onsphere.errors import OnsphereError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line that a page could not be written."""
    try:
        yield
    except OSError as error:
        raise OnsphereError(
            f"cannot write the page {str(path)!r}: {error.strerror or error}"
        ) from error


def check_writable(path: Path) -> None:
    """Say before the work, not after it, that a page cannot be written."""
    from onsphere.report import html  # noqa: F401  # says which extra is missing

    if path.is_dir():
        raise OnsphereError(f"cannot write the page {str(path)!r}: it is a folder; name a file")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise OnsphereError(f"cannot write the page {str(path)!r}: {str(parent)!r} is no folder")


def check_checkpoints(source: Path, result: Path, force: bool) -> None:
    """Say before the work that a checkpoint cannot be read or written so."""
    from onsphere.models import checkpoint

    for path in (source, result):
        if path.suffix not in checkpoint.SUFFIXES:
            raise OnsphereError(
                f"{str(path)!r} must end in one of {', '.join(checkpoint.SUFFIXES)}"
            )
    if result.exists() and not force:
        raise OnsphereError(f"{str(result)!r} is there already; --force overwrites it")
