"""Whole-number weights before and after equalizing: `python -m benchmarks int8 FOLDER`.

A depthwise-separable network is trained on Fashion-MNIST (the four .gz files in FOLDER), its norms
are folded, and its channels are given ranges that differ as those of MobileNetV2 do (Nagel et al.
2019, figure 2: by two orders of magnitude), the function unchanged. Then all weights are rounded to
signed whole numbers with one step per weight, biases and activations stay, and no data is used.
"""

import copy
import gzip
import itertools
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import onsphere as osp
from onsphere.report import Table
from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.rewrite.balancing.channel_scales import moved
from onsphere.symmetry.rewrite.folding.surgery import write
from onsphere.symmetry.rewrite.verification import wide_state
from onsphere.symmetry.rewrite.weight_grid import rounded

_WIDTHS = (16, 32, 64, 64, 128)
_SPREAD = 100.0  # of the factors that channels get
_EPOCHS, _TRAINED = 2, 30_000
_BITS = (8, 6, 4)
_SEEDS = 3


def network() -> nn.Sequential:
    """A small MobileNet: depthwise and pointwise convolutions in turn, ReLU."""

    def block(module: nn.Module, width: int) -> list[nn.Module]:
        return [module, nn.BatchNorm2d(width), nn.ReLU()]

    layers = block(nn.Conv2d(1, _WIDTHS[0], 3, padding=1, bias=False), _WIDTHS[0])
    for i, (narrow, wide) in enumerate(itertools.pairwise(_WIDTHS)):
        stride = 1 + i % 2
        depthwise = nn.Conv2d(narrow, narrow, 3, stride, 1, groups=narrow, bias=False)
        layers += block(depthwise, narrow)
        layers += block(nn.Conv2d(narrow, wide, 1, bias=False), wide)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDTHS[-1], 10))


def tables(words: list[str]) -> Iterator[Table]:
    """Train, round and count, for three seeds."""
    if len(words) != 1:
        raise SystemExit("give the folder with the four .gz files of Fashion-MNIST")
    train, test = (fashion_mnist(Path(words[0]), name) for name in ("train", "t10k"))
    rows = []
    for seed in range(_SEEDS):
        torch.manual_seed(seed)
        net = _trained(network(), train[0][:_TRAINED], train[1][:_TRAINED])
        rows += list(_rounded_each_way(net, test, seed))
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    columns = ("seed", "bits", "float", "rounded", "after range", "after quantization",
               "after norm", "recovered by range", "after AIMET")  # fmt: skip
    note = "Accuracy on the 10,000 test images; one step per weight, no data, biases in float."
    yield Table("Weights as whole numbers, Fashion-MNIST", columns, tuple(rows), note)


def _rounded_each_way(
    net: nn.Module, test: tuple[Tensor, Tensor], seed: int
) -> Iterator[tuple[str, ...]]:
    some = test[0][:64]
    folded = osp.fold(net, some).model
    spread_out(folded, some, seed)
    exact = accuracy(folded, test)
    for bits in _BITS:
        plain = accuracy(on_grid(folded, bits), test)
        found = {
            objective: accuracy(
                on_grid(osp.equalize(folded, some, objective=objective, bits=bits).model, bits),
                test,
            )
            for objective in ("range", "quantization", "norm")
        }
        recovered = (found["range"] - plain) / (exact - plain)
        theirs = _by_aimet(folded, some, bits, test)
        yield (
            str(seed), str(bits), f"{exact:.4f}", f"{plain:.4f}", f"{found['range']:.4f}",
            f"{found['quantization']:.4f}", f"{found['norm']:.4f}", f"{recovered:.2f}",
            "" if theirs is None else f"{theirs:.4f}",
        )  # fmt: skip


def _by_aimet(net: nn.Module, some: Tensor, bits: int, test: tuple[Tensor, Tensor]) -> float | None:
    """Return the accuracy after AIMET's cross-layer scaling, where it is installed."""
    if find_spec("aimet_torch") is None:
        return None
    from aimet_torch.cross_layer_equalization import CrossLayerScaling

    other = copy.deepcopy(net)
    CrossLayerScaling.scale_model(other, None, some)
    return accuracy(on_grid(other, bits), test)


def spread_out(net: nn.Module, inputs: Tensor, seed: int, spread: float = _SPREAD) -> None:
    """Give every channel of every family a factor of its own, the function unchanged."""
    generator = torch.Generator().manual_seed(seed)
    state = wide_state(net)
    families = channel_symmetries(net, inputs)
    drawn = [
        float(np.log(spread))
        * (torch.rand(f.count, generator=generator, dtype=torch.float64) - 0.5)
        for f in families
    ]
    write(net, moved(state, zip(families, drawn, strict=True)))


def on_grid(net: nn.Module, bits: int) -> nn.Module:
    """Return a copy with all weights of two or more axes rounded."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            if p.ndim > 1:
                p.copy_(rounded(p, bits))
    return other


def accuracy(net: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Return the share of right answers."""
    images, labels = test
    with torch.no_grad():
        found = torch.cat([net(x).argmax(1) for x in images.split(500)])
    return float((found == labels).double().mean())


def _trained(net: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    steps = _EPOCHS * (len(images) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(images)).split(256)[: len(images) // 256]:
            optimizer.zero_grad()
            cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def fashion_mnist(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Return images in [0, 1] and labels of one part, ``"train"`` or ``"t10k"``."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.tensor(images).float() / 255, torch.tensor(labels).long()
