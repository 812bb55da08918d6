"""What happened to a perturbation on its way through a model, in one frozen object."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from onsphere._utils.files import write_whole
from onsphere.robustness.amplification import text

MOVES = 0.01
"""A measure whose factor under the rescale is further than this from 1 has moved."""

MEASURES: Mapping[str, str] = MappingProxyType(
    {
        "absolute": "size of the change of a layer's output over that of the input",
        "incremental": "size of the change of a layer's output over that of what it was given",
        "relative": "relative change of a layer's output over that of the input",
        "effective": "size of the change after the layer's normalization over that of what the "
        "layer was given",
        "alignment": "|cosine| between the change that a layer was given and its top right "
        "singular vector",
        "singular": "largest singular value of the layer with its normalization",
        "weight_norm": "Euclidean norm of the layer's weight as it is stored",
    }
)
"""What is measured at each layer; the first five for every perturbation."""


@dataclass(frozen=True)
class Quantiles:
    """Where most examples lie.

    Args:
        low: a tenth of the examples is below.
        middle: the median.
        high: a tenth of the examples is above.
    """

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> "Quantiles | None":
        """Return the quantiles of the values that are numbers; ``None`` if none is.

        Example:
            >>> import torch
            >>> Quantiles.of(torch.tensor([1.0, 2.0, 3.0, float("nan")])).middle
            2.0
        """
        kept = values.detach().double().flatten()
        kept = kept[~kept.isnan()].sort().values
        if not len(kept):
            return None
        # By hand: between two infinite values torch.quantile gives nan, and it refuses many values.
        places = [(len(kept) - 1) * share for share in (0.1, 0.5, 0.9)]
        return cls(*(_between(kept, place) for place in places))


def _between(ordered: Tensor, place: float) -> float:
    below = math.floor(place)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low if low == high or place == below else low + (place - below) * (high - low)


@dataclass(frozen=True)
class LayerGain:
    """One layer, as one run of it treated the perturbations.

    Args:
        name: the module's path, and which run of it where it ran before.
        kind: the module's class.
        adversarial: measure -> quantiles over examples.
        random: the same for random perturbations of the same length, over examples and draws.
        through: the normalization that is taken together with it; empty for none.
        singular: largest singular value of the two together; quantiles over examples.
        weight_norm: norm of its weight as it is stored; ``None`` without one.
        control: measure -> factor by which the function-preserving rescale changed it.
    """

    name: str
    kind: str
    adversarial: Mapping[str, Quantiles]
    random: Mapping[str, Quantiles]
    through: str = ""
    singular: Quantiles | None = None
    weight_norm: float | None = None
    control: Mapping[str, float] = field(default_factory=dict)

    @property
    def bookkeeping(self) -> tuple[str, ...]:
        """The measures that a function-preserving rescale moves: they say nothing of it."""
        return tuple(m for m, factor in self.control.items() if not abs(factor - 1) <= MOVES)

    @property
    def excess(self) -> float | None:
        """How much more of the perturbation is there than of a random one, in the median."""
        found, drawn = self.adversarial.get("absolute"), self.random.get("absolute")
        if found is None or drawn is None or not drawn.middle > 0:
            return None
        return found.middle / drawn.middle


@dataclass(frozen=True)
class Control:
    """What the control experiment did.

    Args:
        change: largest change of an output of the model, relative to the largest output. The
            rescale was to preserve the function: this is rounding, and eps.
        slope: factor by which the slope of the margin changed, in the median.
        distance: the same for margin over slope.
    """

    change: float
    slope: float | None
    distance: float | None

    @property
    def is_same_function(self) -> bool:
        """Whether the rescaled copy gives the same outputs."""
        return self.change <= MOVES


@dataclass(frozen=True)
class Amplification:
    """How the layers of a model treat a perturbation; see :func:`amplification`.

    Args:
        model: name of the model's class.
        examples: how many were measured.
        unchanged: how many more had a perturbation of 0 and were left out.
        draws: random perturbations per example.
        norm: the norm in which perturbations are bounded; slopes are in its dual.
        size: Euclidean length of the perturbations.
        share: their length over that of the input.
        layers: one entry per run of a layer, in the order of execution.
        margin: logit of the label minus the largest other.
        slope: dual norm of the margin's gradient by the input.
        distance: margin over slope.
        flat: share of examples at which that gradient is exactly 0.
        control: the control experiment; ``None`` if there was none.
        notes: what could not be measured, and what to know before reading.
    """

    model: str
    examples: int
    unchanged: int
    draws: int
    norm: str
    size: Quantiles
    share: Quantiles | None
    layers: Sequence[LayerGain]
    margin: Quantiles | None = None
    slope: Quantiles | None = None
    distance: Quantiles | None = None
    flat: float | None = None
    control: Control | None = None
    notes: Sequence[str] = ()

    @property
    def bookkeeping(self) -> tuple[str, ...]:
        """The measures that the rescale moved at some layer."""
        moved = {m for layer in self.layers for m in layer.bookkeeping}
        return tuple(m for m in MEASURES if m in moved)

    def __repr__(self) -> str:
        return (
            f"<Amplification of {self.model}: {len(self.layers)} runs of layers, "
            f"{self.examples} examples, {self.norm}; print() shows all>"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        return text.plain(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold; numbers that are infinite become text."""
        fields: dict[str, Any] = _plain(asdict(self))
        for layer, given in zip(fields["layers"], self.layers, strict=True):
            layer["bookkeeping"] = list(given.bookkeeping)
        return fields

    def to_json(self, path: str | Path) -> Path:
        """Write it to a file, whole or not at all."""
        return write_whole(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
