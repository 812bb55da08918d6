"""Samples as scalars: their names for TensorBoard and other loggers, and what writes them."""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from onsphere.monitor.run import QUANTITIES, Sample

LOGGED = ("norm", "rotation", "effective_lr", "radial")
"""The quantities that go to loggers, as ``onsphere/QUANTITY/LAYER``: means over vectors."""

_NUMBER = re.compile(r"(?<![^./])[0-9]+(?=\.|$)")


class ScalarWriter(Protocol):
    """What is needed of a TensorBoard ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Log one number."""
        ...


def write(writer: ScalarWriter, sample: Sample, layers: Sequence[str]) -> None:
    """Hand the metrics of a sample to a writer.

    Args:
        writer: TensorBoard's ``SummaryWriter``, or what has its ``add_scalar``.
        sample: one sampled step.
        layers: the names of its layers.
    """
    for tag, value in metrics(sample, layers).items():
        writer.add_scalar(tag, value, sample.step)


def metrics(sample: Sample, layers: Sequence[str]) -> dict[str, float]:
    """Return the metrics of a sample by the names that loggers know.

    Args:
        sample: one sampled step.
        layers: the names of its layers.
    """
    return {
        f"onsphere/{quantity}/{layer}": float(sample.values[row, QUANTITIES.index(quantity), 0])
        for row, layer in enumerate(layers)
        for quantity in LOGGED
    }


def by_kind(found: Mapping[str, float]) -> dict[str, float]:
    """Return means over metrics whose names differ in whole numbers between dots only.

    Example:
        >>> by_kind({"norm/h.0.q": 1.0, "norm/h.1.q": 3.0, "norm/h.0.k": 2.0})
        {'norm/h.all.q': 2.0, 'norm/h.0.k': 2.0}
    """
    kinds: dict[str, list[str]] = {}
    for name in found:
        kinds.setdefault(_NUMBER.sub("all", name), []).append(name)
    return {
        kind if len(names) > 1 else names[0]: sum(found[n] for n in names) / len(names)
        for kind, names in kinds.items()
    }
