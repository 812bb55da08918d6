"""Modules made from rows against torch.nn's, forward and backward."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.pairing import Pairing, pair
from onsphere.norms import ActivationNorm, parametrize

_SHAPE = (32, 64, 28, 28)


def measure() -> Iterator[Pairing]:
    """Time every method that torch has too."""
    x = torch.randn(_SHAPE)
    _, channels, *space = _SHAPE
    sample = (channels, *space)
    cases: dict[str, tuple[nn.Module, nn.Module]] = {
        "BatchNorm": (ActivationNorm("bn", channels), nn.BatchNorm2d(channels)),
        "LayerNorm": (ActivationNorm("ln", sample), nn.LayerNorm(sample)),
        "InstanceNorm": (ActivationNorm("in", channels), nn.InstanceNorm2d(channels)),
        "GroupNorm": (ActivationNorm("gn", channels, num_groups=8), nn.GroupNorm(8, channels)),
        "RMSNorm": (ActivationNorm("rms", sample), nn.RMSNorm(sample)),
        "weight norm": (
            parametrize(nn.Conv2d(channels, channels, 3), "wn"),
            nn.utils.parametrizations.weight_norm(nn.Conv2d(channels, channels, 3)),
        ),
        "spectral norm": (
            parametrize(nn.Conv2d(channels, channels, 3), "sn"),
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(channels, channels, 3)),
        ),
    }
    for name, (ours, theirs) in cases.items():
        yield pair(f"{name}, forward and backward", "torch", _step(ours, x), _step(theirs, x))


def _step(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        module.zero_grad()
        module(x.clone().requires_grad_()).sum().backward()

    return step
