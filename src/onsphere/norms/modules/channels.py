"""What modules over ``(batch, channel, *space)`` share: checks, and one value per channel."""

from torch import Tensor


def positive(name: str, given: int) -> int:
    """Return a count.

    Raises:
        ValueError: it is below 1.
    """
    if given < 1:
        raise ValueError(f"{name} must be at least 1, got {given}")
    return given


def check_channels(name: str, x: Tensor, channels: int) -> None:
    """Refuse activations of another layout.

    Raises:
        ValueError: no batch axis, or another number of channels.
    """
    if x.ndim < 2 or x.shape[1] != channels:
        raise ValueError(
            f"{name} expects (batch, {channels} channels, *space), got shape {tuple(x.shape)}"
        )


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value per channel so that it broadcasts against ``x``."""
    return values.reshape(-1, *([1] * (x.ndim - 2)))
