"""The JSON-lines file of a run while it is written: line by line, and on after a crash."""

import os
from pathlib import Path
from typing import IO

from onsphere.dynamics.run import Flag, Run, RunError, Sample, flag_line


class Journal:
    """Appends a run to a file; every line is out before the next step.

    An existing file must hold a run of the same layers: the new lines follow a header that says
    from which step on they replace the older ones. A line that a crash has torn is cut off.

    Args:
        path: where; folders above it are made.
        run: settings and layers.
        start: the first step to come.

    Raises:
        RunError: the file holds something else, or a run of other layers.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, run: Run, start: int) -> None:
        self.path = Path(path)
        self._run, self._start = run, start
        self._stream: IO[str] | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            held = Run.read(self.path)
            if list(held.layers) != list(run.layers):
                raise RunError(
                    f"{path} holds a run of other layers; write this one to another file"
                )
            _mend(self.path)

    def sample(self, sample: Sample) -> None:
        """Append a sample."""
        self._write(self._run.sample_line(sample))

    def flag(self, flag: Flag) -> None:
        """Append a flag."""
        self._write(flag_line(flag))

    def close(self) -> None:
        """Close the file; a line that follows opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write(self, line: str) -> None:
        """Append a line, after the header if it is the first one of this run."""
        if self._stream is None:
            self._stream = self.path.open("a", encoding="utf-8")
        if self._start >= 0:
            self._stream.write(self._run.header(self._start) + "\n")
            self._start = -1
        self._stream.write(line + "\n")
        self._stream.flush()


def _mend(path: Path) -> None:
    """Cut off a torn last line, so that the next one does not continue it."""
    with path.open("rb+") as stream:
        size = stream.seek(0, os.SEEK_END)
        end = size
        while end and stream.seek(end - 1) is not None and stream.read(1) != b"\n":
            end -= 1
        if end != size:
            stream.truncate(end)
