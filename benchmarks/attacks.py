"""PGD against the bare loop that one would write by hand."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.pairing import Pairing, pair
from onsphere.robustness import pgd

_EPS, _STEPS = 0.1, 10


def measure() -> Iterator[Pairing]:
    """Time l-infinity PGD on a small convolutional network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 14 * 14, 10),
    ).eval()
    x = torch.rand(128, 1, 28, 28)
    y = model(x).argmax(1)

    def bare() -> None:
        z = x.clone()
        for _ in range(_STEPS):
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
            z = z.detach() + _EPS / 4 * gradient.sign()
            z = torch.min(torch.max(z, x - _EPS), x + _EPS).clamp(0, 1)

    def ours() -> None:
        pgd(model, x, y, eps=_EPS, steps=_STEPS, step_size=_EPS / 4)

    yield pair(f"PGD, {_STEPS} steps, 128 images", "a bare loop", ours, bare, pairs=15)
