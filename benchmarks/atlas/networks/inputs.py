"""What the networks are given."""

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Tensor, ...]]
"""A module and its inputs."""


def tokens(batch: int = 2, length: int = 12, vocabulary: int = 64) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=generator())


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
