"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file so that no reader, and no crash, ever meets half of it.

    The content goes to a hidden file beside ``path``, reaches the disk, and is then renamed onto
    it. Folders above it are made.

    Args:
        path: where the file shall stand; an older one is replaced.
        content: what it shall hold.

    Returns:
        ``path``.

    Raises:
        OSError: the folder cannot be made or written. Nothing is left behind, and an older file
            is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "new" / "a.txt", b"sphere").read_text()
        'sphere'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path
