"""What a user names on a command line, once it is loaded: a model with inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onsphere._torch.execution import OutputPicker
from onsphere.errors import OnsphereError

Size = Literal["auto", "shrink", "full", "real"]
CERTIFIABLE = 200_000_000
"""Weights up to which a model that could be built without memory is audited with it."""


class TargetError(OnsphereError, ValueError):
    """A TARGET that cannot be used; one line says why."""


@dataclass(frozen=True)
class Target:
    """A model with inputs.

    Args:
        model: the module.
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors to keep fixed.
        note: what was done to the model so that it could be built (shrunk, without memory).
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: OutputPicker | None = None
    note: str = ""


def parse_shape(text: str) -> tuple[int, ...]:
    """Read a shape such as ``8x3x32x32`` or ``8,3,32,32``.

    Raises:
        TargetError: it holds anything but positive whole numbers.

    Example:
        >>> parse_shape("8x3x32x32")
        (8, 3, 32, 32)
    """
    parts = text.lower().replace("×", "x").replace("x", ",").split(",")
    sizes = tuple(int(n) for n in parts if n.isascii() and n.isdigit())
    if len(sizes) != len(parts) or min(sizes) < 1:
        raise TargetError(f"{text!r} is no shape: give positive sizes, as 8x3x32x32")
    return sizes


def random_floats(shape: tuple[int, ...]) -> Tensor:
    """Return the same random input every time.

    Raises:
        TargetError: there is no memory for it.
    """
    try:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    except RuntimeError as error:
        raise TargetError(
            f"there is no memory for an input of shape {'x'.join(map(str, shape))}"
        ) from error
