"""Classifiers whose robustness is known in closed form, or hidden on purpose."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

WIDE = (-100.0, 100.0)
DUAL = {"linf": 1, "l2": 2}
"""The order of the dual norm: the distance to a plane is its offset over the slope's dual norm."""


def linear(generator, *, classes=5, inputs=12, examples=80, dtype=torch.float64):
    """A linear classifier, inputs in [0, 1], and the labels that it gives them."""
    net = torch.nn.Linear(inputs, classes).to(dtype)
    for param in net.parameters():
        param.data = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.rand(examples, inputs, generator=generator, dtype=torch.float64).to(dtype)
    return net.requires_grad_(False), x, net(x).argmax(1)


def distances(net, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """The exact distance of every example to the nearest other class, without a box."""
    z, w = net(x), net.weight
    slopes = torch.linalg.vector_norm(w[y].unsqueeze(1) - w, DUAL[norm], dim=2)
    ratio = (z.gather(1, y[:, None]) - z) / torch.where(slopes > 0, slopes, 1.0)
    return ratio.scatter(1, y[:, None], torch.inf).amin(1)


def conv_net(generator, *, examples=60, classes=5):
    """A small random convolutional network in eval mode, images, and the labels it gives."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(4 * 16, classes),
    )  # fmt: skip
    for param in net.parameters():
        param.data = torch.randn(param.shape, generator=generator)
    x = torch.rand(examples, 1, 6, 6, generator=generator)
    return net.eval().requires_grad_(False), x, net(x).argmax(1)


def on_digits(make: Callable[[], nn.Module], *, lr: float, epochs: int, count: int):
    """A network trained on the digits of scikit-learn, and ``count`` of those it was not shown."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16).float().view(-1, 1, 8, 8), torch.tensor(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make()
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        for index in torch.randperm(1500).repeat(epochs).split(100):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
        optimizer.zero_grad()
    held_out = slice(1500, 1500 + count)
    return net.eval().requires_grad_(False), x[held_out], y[held_out]


class Quantized(torch.autograd.Function):
    """Rounding with its true derivative, zero."""

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


def inside(z: Tensor, x: Tensor, eps: float, norm: str, bounds=(0.0, 1.0)) -> bool:
    """Whether every example lies in its ball and the box, to rounding."""
    order = {"linf": torch.inf, "l2": 2}[norm]
    size = torch.linalg.vector_norm((z - x).double().flatten(1), order, dim=1)
    return bool((size <= eps * (1 + 1e-5)).all() and z.min() >= bounds[0] and z.max() <= bounds[1])
