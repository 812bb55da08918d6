"""The JSON-lines file of a run while it is written: line by line, and on after a crash."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from onsphere._utils.warning import warn
from onsphere.dynamics.optimizers import Vector
from onsphere.monitor.layers import Layer
from onsphere.monitor.run import KIND, Flag, Run, RunError, Sample, flag_line, same_layers
from onsphere.optim.wrapper import OnSphere

_OPENING = json.dumps({"kind": KIND}, separators=(",", ":"))[:-1].encode()


class Journal:
    """Appends a run to a file; every line is out before the next step.

    An existing file must hold a run of the same layers: the new lines follow a header that says
    from which step on they replace the older ones. A line that a crash has torn is cut off. A file
    that cannot be written any more, as on a full disk, is given up with a warning.

    Args:
        path: where; folders above it are made.
        run: settings and layers.
        start: the first step to come; ``None`` for 0 in a file that holds no sample.

    Attributes:
        flags: of the steps before the start, which the file holds already.

    Raises:
        RunError: the file cannot be written, holds something else, a run of other layers, or
            samples while no start is given.
    """

    def __init__(self, path: str | Path, run: Run, start: int | None) -> None:
        self.path = Path(path)
        self.flags: list[Flag] = []
        self._run, self._start = run, start or 0
        self._stream: IO[str] | None = None
        self._given_up = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._go_on(start)
            self._open()
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}") from error

    def sample(self, sample: Sample) -> None:
        """Append a sample."""
        self._write(self._run.sample_line(sample))

    def flag(self, flag: Flag) -> None:
        """Append a flag."""
        self._write(flag_line(flag))

    def close(self) -> None:
        """Close the file; a line that follows opens it again."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()

    def _go_on(self, start: int | None) -> None:
        """Check what the file holds, and make its end fit for the next line."""
        _mend_first(self.path)
        if not self.path.stat().st_size:
            return
        held = Run.read(self.path)
        if not same_layers(held.layers, self._run.layers):
            raise RunError(
                f"{self.path} holds a run of other layers; write this one to another file"
            )
        if start is None and held.samples:
            raise RunError(
                f"{self.path} holds steps up to {held.samples[-1].step}; give start= to go on "
                "(what it holds from that step on will not count), or another file"
            )
        self.flags = [flag for flag in held.flags if flag.step < self._start]
        _mend_last(self.path)

    def _open(self) -> IO[str]:
        if self._stream is None:
            self._stream = self.path.open("a", encoding="utf-8")
        return self._stream

    def _write(self, line: str) -> None:
        """Append a line, after the header if it is the first one of this run."""
        if self._given_up:
            return
        try:
            stream = self._open()
            if self._start >= 0:
                stream.write(self._run.header(self._start) + "\n")
                self._start = -1
            stream.write(line + "\n")
            stream.flush()
        except OSError as error:
            self._given_up = True
            warn(
                f"{self.path} cannot be written any more ({error.strerror}); the monitor goes on "
                "without it"
            )
            self._abandon()

    def _abandon(self) -> None:
        """Let go of the file, whose buffer may not be written either."""
        with contextlib.suppress(OSError):
            self.close()


def _mend_first(path: Path) -> None:
    """Empty a file that holds nothing but a torn header; files of others are left alone."""
    with path.open("rb+") as stream:
        line = stream.readline()
        torn = not line.endswith(b"\n") and not _complete(line)
        if torn and (line.startswith(_OPENING) or _OPENING.startswith(line)):
            stream.truncate(0)


def _mend_last(path: Path) -> None:
    """End a last line that is whole, and cut off a torn one, so that the next one is on its own."""
    with path.open("rb+") as stream:
        end, last = 0, b""
        for line in stream:
            end, last = end + len(line), line
        if last.endswith(b"\n"):
            return
        if _complete(last):
            stream.write(b"\n")
        else:
            stream.truncate(end - len(last))


def _complete(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def vector_of(layer: Layer) -> Vector:
    """Return one vector of a layer, as the laws see it."""
    return Vector(layer.coordinates, layer.vectors, tuple(layer.params[0].shape))


def about(layer: Layer, law: str | None, degree: int) -> dict[str, Any]:
    """Return what the header says of a layer."""
    axes = layer.sphere.axes
    return {
        "shape": list(layer.params[0].shape),
        "axes": {"index": list(axes.index), "pieces": [list(p) for p in axes.pieces]}
        | ({"strided": [list(s) for s in axes.strided]} if axes.strided else {}),
        "vectors": layer.vectors,
        "coordinates": layer.coordinates,
        "group": layer.group,
        "law": law,
        "degree": degree,
        **({} if layer.invariant else {"invariant": False}),
    }


def settings_of(optimizer: Optimizer, layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the optimizer's name and plain settings; top level: those of the first layer."""
    groups = [_plain(group) for group in optimizer.param_groups]
    base = optimizer.base if isinstance(optimizer, OnSphere) else optimizer
    own = {"name": type(base).__name__}
    if isinstance(optimizer, OnSphere):
        own["on_sphere"] = optimizer.mode
    first = groups[layers[0].group]  # may have a name of its own
    return {**own, **first, **own, "groups": groups}


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a param group that JSON can hold."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = float(value)
        if isinstance(value, bool | int | str) or value is None:
            found[key] = value
        elif isinstance(value, float):
            found[key] = value if math.isfinite(value) else None
        elif key == "betas":
            found[key] = [float(beta) for beta in value]
    return found
