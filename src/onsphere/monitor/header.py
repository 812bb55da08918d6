"""What the first line of a run says of its optimizer and layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from onsphere.monitor.forecast import Vector
from onsphere.monitor.layers import Layer
from onsphere.optim.wrapper import OnSphere


def vector_of(layer: Layer) -> Vector:
    """Return one vector of a layer, as the laws see it."""
    return Vector(layer.coordinates, layer.vectors, tuple(layer.params[0].shape))


def about(layer: Layer, law: str | None, degree: int) -> dict[str, Any]:
    """Return what the header says of a layer."""
    axes = layer.sphere.axes
    return {
        "shape": list(layer.params[0].shape),
        "axes": {"index": list(axes.index), "pieces": [list(p) for p in axes.pieces]},
        "vectors": layer.vectors,
        "coordinates": layer.coordinates,
        "group": layer.group,
        "law": law,
        "degree": degree,
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
