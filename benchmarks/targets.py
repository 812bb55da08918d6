"""Trained networks to attack: what ``python -m benchmarks.autoattack`` measures on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onsphere.robustness import pgd
from onsphere.studies.setup.data import Images, Source
from onsphere.studies.setup.network import SmallConvNet


@dataclass(frozen=True)
class Attacked:
    """A network in eval mode with test images, and the radii of interest."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    linf: float
    l2: float

    def first(self, images: int) -> "Attacked":
        """Return the same with fewer images."""
        return replace(self, x=self.x[:images], y=self.y[:images])


def _fitted(images: Images, method: str, *, steps: int, eps: float = 0.0) -> nn.Module:
    """Train a small convolutional network with Adam, on attacked images where ``eps`` is given."""
    model = SmallConvNet(method, images, width=8, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        index = torch.randint(len(images.train_y), (64,), generator=generator)
        x, y = images.train_x[index], images.train_y[index]
        if eps:
            radius = eps * min(1.0, 2 * step / steps)  # from nothing, or it learns nothing
            x = pgd(model.eval(), x, y, eps=max(radius, 1e-3), steps=5) if radius else x
        loss = F.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def _small(
    data: str, method: str, *, linf: float, l2: float, steps: int = 400, eps: float = 0.0
) -> Callable[[Path], Attacked]:
    def make(folder: Path) -> Attacked:
        images = Source(data, folder).load()
        name = f"{data}, {method}{', PGD-trained' if eps else ''}"
        model = _fitted(images, method, steps=steps, eps=eps)
        return Attacked(name, model, images.test_x, images.test_y, linf, l2)

    return make


def _certified(folder: Path) -> Attacked:
    """The published Fashion-MNIST network that was trained for a certificate."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    path = folder / "checkpoints" / "fashion_mnist.pth"
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    images = Source("fashion-mnist", folder).load()
    model = model.eval().requires_grad_(False)
    return Attacked("certified (checkpoint)", model, images.test_x, images.test_y, 0.1, 1.0)


class _Shortcut(nn.Module):
    """A residual block of two convolutions whose shortcut has no parameters."""

    def __init__(self, planes_in: int, planes: int) -> None:
        super().__init__()
        self.stride, self.pad = (1, 0) if planes_in == planes else (2, (planes - planes_in) // 2)
        self.conv1 = nn.Conv2d(planes_in, planes, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = x[:, :, :: self.stride, :: self.stride]
        return F.relu(inner + F.pad(skip, (0, 0, 0, 0, self.pad, self.pad)))


class _ResNet(nn.Module):
    """The CIFAR ResNet of 6n + 2 layers, for images in [0, 1]."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16), (16, 32), (32, 64)]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_Shortcut(a, b), *(_Shortcut(b, b) for _ in range(blocks - 1)))
            for a, b in widths
        )
        self.linear = nn.Linear(64, 10)
        self.mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        self.spread = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.spread)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(folder: Path, name: str, blocks: int) -> nn.Module:
    """Return a published CIFAR ResNet, in evaluation mode."""
    model = _ResNet(blocks)
    path = next((folder / "checkpoints").glob(f"{name}-*.th"))
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def _resnet20(folder: Path) -> Attacked:
    """The published ResNet-20 on CIFAR-10's own pixels (training images: others are not there)."""
    model = cifar_resnet(folder, "resnet20", 3)
    with np.load(folder / "cifar10" / "cifar10_lossless_first4000_train.npz") as file:
        pixels, labels = file["images"], file["labels"]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    y = torch.from_numpy(labels).long()
    model = model.eval().requires_grad_(False)
    return Attacked("CIFAR-10, ResNet-20 (checkpoint)", model, x.contiguous(), y, 1 / 255, 0.1)


NETWORKS: dict[str, Callable[[Path], Attacked]] = {
    "certified": _certified,
    "mnist-bn": _small("mnist", "bn", linf=0.05, l2=0.7),
    "mnist-robust": _small("mnist", "none", linf=0.2, l2=1.5, steps=1200, eps=0.2),
    "fashion-ln": _small("fashion-mnist", "ln", linf=0.02, l2=0.3),
    "digits-gn": _small("digits", "gn", linf=0.1, l2=0.6),
    "resnet20": _resnet20,
}
"""Makers of the networks; each takes the folder of published data."""
