"""One table of optimizers on spheres and one of layouts, for the suites of this folder."""

from typing import Any, NamedTuple

import torch

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD


class Row(NamedTuple):
    """One optimizer.

    Attributes:
        kind: the class.
        settings: its own.
        divides_by_moment: a second moment takes the gradient's size out of the update.
        by_coordinate: that moment has a number for each coordinate, so that the update depends on
            the axes, and momentum stays where it is when the point moves.
    """

    kind: type
    settings: dict[str, Any]
    divides_by_moment: bool = False
    by_coordinate: bool = False


ROWS = Sphere(VectorAxes((0,)))

OPTIMIZERS = {
    "SGD": Row(SphereSGD, {}),
    "SGD momentum": Row(SphereSGD, {"momentum": 0.9}),
    "SGD Nesterov": Row(SphereSGD, {"momentum": 0.9, "nesterov": True}),
    "SGD dampened": Row(SphereSGD, {"momentum": 0.9, "dampening": 0.5}),
    "AdamW": Row(SphereAdamW, {"weight_decay": 0.0}, divides_by_moment=True, by_coordinate=True),
    "AdamW, moment per vector": Row(
        SphereAdamW, {"second_moment": "vector", "weight_decay": 0.0}, divides_by_moment=True
    ),
}
# name -> how a step is made
TRAVELS = {
    "projection": {"lr_mode": "rate"},
    "exponential": {"lr_mode": "rate", "retraction": "exponential"},
    "relative": {},
    "relative, exponential": {"retraction": "exponential"},
    "rotation": {"lr_mode": "angle"},
    "rotation, exponential": {"lr_mode": "angle", "retraction": "exponential"},
}
# name -> shape, what is done to the memory, sphere
LAYOUTS = {
    "rows": ((6, 37), None, ROWS),
    "many rows": ((21, 37), None, ROWS),
    "whole": ((6, 37), None, Sphere()),
    "filters": ((6, 5, 3, 3), None, ROWS),
    "filters, channels last": ((6, 5, 3, 3), "channels_last", ROWS),
    "columns": ((37, 6), None, Sphere(VectorAxes((1,)))),
    "many columns": ((9, 530), None, Sphere(VectorAxes((1,)))),
    "transposed": ((37, 6), "transposed", Sphere(VectorAxes((1,)))),
    "groups": ((6, 5, 3), None, Sphere(VectorAxes(pieces=((0, 2),)))),
    "heads of columns": ((7, 24), None, Sphere(VectorAxes(pieces=((1, 4),)))),
    "wide heads of columns": ((3, 400), None, Sphere(VectorAxes(pieces=((1, 2),)))),
    "pairs of rows": ((12, 37), None, Sphere(VectorAxes(strided=((0, 2, 3),)))),
    "columns of groups": ((7, 24), None, Sphere(VectorAxes(strided=((1, 2, 3),)))),
    "experts": ((3, 7, 10), None, Sphere(VectorAxes((0, 2)))),
    "batches of heads": ((2, 6, 7, 5), None, Sphere(VectorAxes((0,), ((2, 7),)))),
    "not for the kernel": ((6, 5, 4), None, Sphere(VectorAxes(pieces=((0, 2), (1, 5), (2, 2))))),
    "given radius": ((6, 37), None, Sphere(VectorAxes((0,)), radius=3.0)),
    "long rows": ((2, 3000), None, ROWS),
    "large": ((1, 150_001), None, Sphere()),
    "every entry": ((4, 3), None, Sphere(VectorAxes((0, 1)))),
    "centred": ((6, 37), None, Sphere(VectorAxes((0,)), centered=True)),
}


def place(x: torch.Tensor, memory: str | None) -> torch.Tensor:
    """Copy a tensor into the wanted memory layout."""
    if memory == "channels_last":
        return x.clone(memory_format=torch.channels_last)
    if memory == "transposed":
        return x.mT.contiguous().mT
    return x.clone()


def make(name, groups, options="projection", **settings):
    """Build an optimizer of the table."""
    row = OPTIMIZERS[name]
    return row.kind(groups, **{**row.settings, **TRAVELS[options], **settings})


def feed(weights, optimizer, *grads):
    """One step for each gradient."""
    for grad in grads:
        for weight in weights:
            weight.grad = grad.clone().to(weight.dtype)
        optimizer.step()
