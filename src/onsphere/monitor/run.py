r"""A watched run, as the monitor writes it and everything else reads it.

The file has one JSON object per line. The first says what was watched::

    {"kind": "onsphere-run", "version": 1, "every": 10, "start": 0, "versions": {"torch": "..."},
     "optimizer": {"name": "AdamW", "lr": 0.001, "weight_decay": 0.1, "betas": [0.9, 0.95], ...,
                   "groups": [{"lr": 0.001, ...}, ...]},
     "layers": {NAME: {"shape": [64, 32], "vectors": 64, "coordinates": 32, "group": 0,
                       "law": "adamw", "degree": 1}, ...}}

then follow one line per sample, and one per flag when it is raised::

    {"step": 20, "lr": 0.001, "layers": {NAME: {"lr": 0.001, "norm": {"mean": 1.0, "q10": ...},
     "rotation": {...}, ..., "counts": {"dead": 0, ...}, "predicted": {"norm": 1.1, ...}}, ...}}
    {"flag": "dead", "layer": NAME, "step": 20, "message": "..."}

``optimizer`` repeats the settings of the first layer's group. What has no value, or none that is
finite, is ``null``. A run that is resumed goes on with a second first line, whose ``start`` says
from which step on the older lines no longer count. A crash can tear the last line; it is left out.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onsphere.errors import OnsphereError, nearest

KIND, VERSION = "onsphere-run", 1

QUANTITIES = ("norm", "gradient", "effective_lr", "rotation", "radial", "unit_gradient_square")
"""What is measured of every vector at a sampled step; see :class:`onsphere.Monitor`."""

STATISTICS = ("mean", "q10", "q50", "q90")
"""What is kept of a quantity: its mean over the vectors of a layer, and three quantiles."""

COUNTS = ("dead", "eps", "optimizer_eps", "nonfinite")
"""How many vectors of a layer: without gradient, off the sphere by eps, with a gradient below the
optimizer's eps, not finite."""

PREDICTIONS = ("norm", "rotation", "equilibrium_norm", "equilibrium_rotation", "half_life")
"""What the laws expect of a layer: at this step, and where it would settle."""

Values = NDArray[np.float64]

Layers = Mapping[str, Mapping[str, Any]]

_IDENTITY = ("shape", "vectors", "coordinates")
"""What the header says of a layer that a run cannot change when it is resumed."""


class RunError(OnsphereError, ValueError):
    """A file that holds no run, or a name that is not in it."""


@dataclass(frozen=True)
class Flag:
    """Something in a run that deserves a look.

    Args:
        kind: ``"nonfinite"``, ``"dead"``, ``"eps"``, ``"runaway"``, ``"collapse"`` or ``"drift"``.
        layer: the weight.
        step: at which step it was seen first.
        message: what was seen and what it means, as a sentence.
    """

    kind: str
    layer: str
    step: int
    message: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.layer}: {self.message}"


@dataclass(frozen=True, eq=False)
class Sample:
    """One sampled step; layers in the order of the run.

    Args:
        step: its number, from 0.
        lrs: learning rate of each layer, shape ``(layers,)``.
        values: shape ``(layers, quantities, statistics)``, as in ``QUANTITIES``, ``STATISTICS``.
        counts: shape ``(layers, counts)``, as in ``COUNTS``.
        predicted: shape ``(layers, predictions)``, as in ``PREDICTIONS``; NaN for no prediction.
    """

    step: int
    lrs: Values
    values: Values
    counts: Values
    predicted: Values


@dataclass(frozen=True, eq=False)
class Run:
    """A watched run: its settings and everything that was sampled.

    Args:
        optimizer: name and settings, as in the first line of the file.
        layers: name -> shape, number of vectors, coordinates of one, param group, and law.
        samples: in the order of their steps.
        flags: in the order in which they were raised.
        every: each how many steps were sampled.
        versions: of the libraries that made it.

    Example:
        >>> one = np.ones(1)
        >>> values = np.full((1, len(QUANTITIES), len(STATISTICS)), 2.0)
        >>> counts, none = np.zeros((1, len(COUNTS))), np.full((1, len(PREDICTIONS)), np.nan)
        >>> run = Run({"name": "SGD"}, {"a": {}}, [Sample(5, one, values, counts, none)])
        >>> run.steps.tolist(), run.series("a", "norm").tolist()
        ([5], [2.0])
    """

    optimizer: Mapping[str, Any]
    layers: Layers
    samples: list[Sample] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    every: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: means of the last sample, layer by layer, and the flags."""
        shown = ("norm", "rotation", "effective_lr", "radial")
        head = "".join(f"<th>{escape(word)}</th>" for word in ("layer", *shown))
        rows = [
            f"<tr><td>{escape(name)}</td>"
            + "".join(f"<td>{self.series(name, quantity)[-1]:.4g}</td>" for quantity in shown)
            for name in (self.layers if self.samples else ())
        ]
        flags = [f"<li>{escape(str(flag))}</li>" for flag in self.flags]
        return f"<p>{escape(repr(self)[1:-1])}</p><table><tr>{head}</tr>{''.join(rows)}</table>" + (
            f"<ul>{''.join(flags)}</ul>" if flags else ""
        )

    def __repr__(self) -> str:
        last = f" up to step {self.samples[-1].step}" if self.samples else ""
        return (
            f"<Run of {self.optimizer.get('name')}: {len(self.layers)} layers, "
            f"{len(self.samples)} samples{last}, {len(self.flags)} flags>"
        )

    @classmethod
    def read(cls, path: str | Path) -> "Run":
        """Read a file that a monitor wrote, or is still writing.

        Args:
            path: a JSON-lines file.

        Returns:
            The run, without lines that a resumed run has replaced and without a torn last line.

        Raises:
            RunError: the file cannot be read or holds something else; it names the line.
        """
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return cls.from_lines(text.splitlines(keepends=True))
        except RunError as error:
            raise RunError(f"{path} holds no watched run: {error}") from error

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> "Run":
        """Read a run from its lines; see :meth:`read`.

        Raises:
            RunError: they are something else.
        """
        run: Run | None = None
        given = list(lines)
        for number, line in enumerate(given, 1):
            entry = _parsed(line, number, last=number == len(given))
            if entry is None:
                break
            try:
                if entry.get("kind") == KIND:
                    run = _continued(run, entry)
                elif run is None:
                    raise RunError(f'line 1 is not a header with "kind": "{KIND}"')
                elif "flag" in entry:
                    run.flags.append(
                        Flag(entry["flag"], entry["layer"], entry["step"], entry["message"])
                    )
                else:
                    run.samples.append(_sample(entry, run.layers))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                if isinstance(error, RunError):
                    raise
                raise RunError(f"line {number} lacks or spoils {error}") from error
        if run is None:
            raise RunError("it is empty")
        return run

    @property
    def steps(self) -> NDArray[np.int64]:
        """The sampled steps."""
        return np.array([sample.step for sample in self.samples], dtype=np.int64)

    def series(self, layer: str, quantity: str, statistic: str = "mean") -> Values:
        """Return a measured quantity of a layer over the run.

        Args:
            layer: one of ``layers``.
            quantity: one of ``QUANTITIES``.
            statistic: one of ``STATISTICS``.

        Returns:
            One number per sample.

        Raises:
            RunError: an unknown name.
        """
        row = _place(layer, list(self.layers), "layer")
        column = _place(quantity, QUANTITIES, "quantity")
        kind = _place(statistic, STATISTICS, "statistic")
        return np.array([sample.values[row, column, kind] for sample in self.samples])

    def predicted(self, layer: str, quantity: str) -> Values:
        """Return what the laws expected of a layer, one number per sample; NaN for nothing.

        Args:
            layer: one of ``layers``.
            quantity: one of ``PREDICTIONS``.

        Raises:
            RunError: an unknown name.
        """
        row = _place(layer, list(self.layers), "layer")
        column = _place(quantity, PREDICTIONS, "prediction")
        return np.array([sample.predicted[row, column] for sample in self.samples])

    def lr(self, layer: str) -> Values:
        """Return the learning rate of a layer, one number per sample.

        Raises:
            RunError: an unknown name.
        """
        row = _place(layer, list(self.layers), "layer")
        return np.array([sample.lrs[row] for sample in self.samples])

    def header(self, start: int = 0) -> str:
        """Return the first line of the file.

        Args:
            start: from which step on the samples follow.
        """
        return _line(
            {
                "kind": KIND,
                "version": VERSION,
                "every": self.every,
                "start": start,
                "versions": dict(self.versions),
                "optimizer": self.optimizer,
                "layers": self.layers,
            }
        )

    def sample_line(self, sample: Sample) -> str:
        """Return the line of a sample."""
        layers = {}
        for row, name in enumerate(self.layers):
            measured = {
                quantity: _named(STATISTICS, sample.values[row, column])
                for column, quantity in enumerate(QUANTITIES)
            }
            layers[name] = {
                "lr": _number(sample.lrs[row]),
                **measured,
                "counts": {k: int(n) for k, n in zip(COUNTS, sample.counts[row], strict=True)},
                "predicted": _named(PREDICTIONS, sample.predicted[row]),
            }
        first = _number(sample.lrs[0]) if len(sample.lrs) else None
        return _line({"step": sample.step, "lr": first, "layers": layers})


def flag_line(flag: Flag) -> str:
    """Return the line of a flag.

    Example:
        >>> flag_line(Flag("dead", "a", 3, "no gradient"))
        '{"flag":"dead","layer":"a","step":3,"message":"no gradient"}'
    """
    return _line(
        {"flag": flag.kind, "layer": flag.layer, "step": flag.step, "message": flag.message}
    )


def same_layers(first: Layers, second: Layers) -> bool:
    """Whether two headers speak of the same weights, cut into the same vectors.

    Args:
        first: name -> what the header says of a layer.
        second: likewise.

    Example:
        >>> same_layers({"a": {"shape": [2, 3], "vectors": 2}}, {"a": {"shape": [2, 3]}})
        False
    """
    return list(first) == list(second) and all(
        first[name].get(key) == second[name].get(key) for name in first for key in _IDENTITY
    )


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, separators=(",", ":"), allow_nan=False)


def _parsed(line: str, number: int, *, last: bool) -> dict[str, Any] | None:
    """Parse one line; ``None`` for a last line that was torn while it was written."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        if last and number > 1 and not line.endswith("\n"):
            return None
        raise RunError(f"line {number} is not JSON ({error.msg})") from error
    if not isinstance(entry, dict):
        raise RunError(f"line {number} is not an object")
    return entry


def _continued(run: Run | None, header: Mapping[str, Any]) -> Run:
    """Start a run, or go on with one that was resumed."""
    if header["version"] != VERSION:
        raise RunError(
            f"it has version {header['version']} of the format, and this onsphere reads {VERSION}"
        )
    layers = header["layers"]
    if run is not None and not same_layers(run.layers, layers):
        raise RunError("it was resumed with other layers")
    start = header["start"]
    samples = [] if run is None else [s for s in run.samples if s.step < start]
    flags = [] if run is None else [f for f in run.flags if f.step < start]
    return Run(header["optimizer"], layers, samples, flags, header["every"], header["versions"])


def _sample(entry: Mapping[str, Any], layers: Iterable[str]) -> Sample:
    rows = [entry["layers"][name] for name in layers]
    values = [[[_float(row[q][s]) for s in STATISTICS] for q in QUANTITIES] for row in rows]
    return Sample(
        int(entry["step"]),
        np.array([_float(row["lr"]) for row in rows]),
        np.array(values).reshape(len(rows), len(QUANTITIES), len(STATISTICS)),
        np.array([[float(row["counts"].get(k, 0)) for k in COUNTS] for row in rows]),
        np.array([[_float(row["predicted"][k]) for k in PREDICTIONS] for row in rows]),
    )


def _named(names: Iterable[str], values: Values) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(names, values, strict=True)}


def _number(value: float) -> float | None:
    """Return six digits, which is what float32 holds; nothing for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _place(name: str, allowed: Iterable[str], what: str) -> int:
    names = list(allowed)
    if name not in names:
        raise RunError(f"the run has no {what} {name!r}{nearest(name, names)}")
    return names.index(name)
