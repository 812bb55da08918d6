"""Does a canonical form lower the barrier of a linear merge?

``python -m benchmarks merging FOLDER``. A network is trained on Fashion-MNIST (the four .gz files
in FOLDER), and a copy of it goes on with images that are turned by 90 degrees. Between the two
weights lies a line; the barrier is by how much the loss on it, on upright and turned images
together, exceeds the line between its ends. The same is measured after both were put into a
canonical form: the same two functions, other weights.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import onsphere as osp
from benchmarks.int8 import fashion_mnist
from onsphere.report import Table

_TRAINED, _TESTED, _BATCH = 8_000, 2_000, 128
_EPOCHS = (3, 2)  # of the base, of the fine-tuning
_SHARES = torch.linspace(0, 1, 9)
_SEEDS = 4

Data = tuple[Tensor, Tensor]


def tables(words: Sequence[str]) -> Iterator[Table]:
    """Train, merge and measure."""
    if len(words) != 1:
        raise SystemExit("give the folder with the four .gz files of Fashion-MNIST")
    train, test = (fashion_mnist(Path(words[0]), name) for name in ("train", "t10k"))
    rows = []
    for name, norm in (("BatchNorm", True), ("no norm", False)):
        found = []
        for seed in range(_SEEDS):
            found.append(_of_seed(norm, seed, train, test))
            print(f"{name}, seed {seed} done", file=sys.stderr, flush=True)
        for i, form in enumerate(("as trained", *_FORMS)):
            mine = torch.tensor([f[i] for f in found])
            less = mine - torch.tensor([f[0] for f in found])
            error = float(less[:, 0].std()) / _SEEDS**0.5
            rows.append(
                (
                    name, form, f"{float(mine[:, 0].mean()):.3f}",
                    f"{float(less[:, 0].mean()):+.3f} ± {3.18 * error:.3f}" if i else "",
                    f"{float(mine[:, 1].mean()):.3f}",
                )
            )  # fmt: skip
    columns = ("network", "form", "barrier", "against as trained", "accuracy at the middle")
    note = (
        f"Means over {_SEEDS} seeds; differences are paired, with 95 % intervals (Student). "
        "Running statistics are estimated again on the merged weights."
    )
    yield Table("Merging a fine-tuned network with its base", columns, tuple(rows), note)


def network(norm: bool) -> nn.Sequential:
    """Return a small convolutional network with ReLU."""
    layers: list[nn.Module] = []
    for narrow, wide in ((1, 16), (16, 32), (32, 64)):
        layers.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
        layers += [nn.BatchNorm2d(wide)] if norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


def _canonical(net: nn.Module, some: Tensor) -> nn.Module:
    audit = osp.audit(net.train(), some)
    return osp.canonicalize(net, audit, some, radius="unit", channels=False, tolerance=1e-3).eval()


def _least_norm(net: nn.Module, some: Tensor) -> nn.Module:
    return osp.equalize(net, some, objective="norm").model


_FORMS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "canonicalize, per tensor": _canonical,
    "equalize, norm": _least_norm,
}


def _of_seed(norm: bool, seed: int, train: Data, test: Data) -> list[tuple[float, float]]:
    torch.manual_seed(seed)
    images, labels = train[0][:_TRAINED], train[1][:_TRAINED]
    base = _trained(network(norm), images, labels, _EPOCHS[0])
    tuned = _trained(copy.deepcopy(base), images.rot90(1, (2, 3)), labels, _EPOCHS[1])
    x, y = test[0][:_TESTED], test[1][:_TESTED]
    both = (torch.cat([x, x.rot90(1, (2, 3))]), torch.cat([y, y]))
    seen = torch.cat([images[:1000], images[1000:2000].rot90(1, (2, 3))])
    found = [_barrier(base, tuned, both, seen)]
    for form in _FORMS.values():
        some = images[:64]
        found.append(_barrier(form(base, some), form(tuned, some), both, seen))
    return found


def _trained(net: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(_BATCH):
            optimizer.zero_grad()
            cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return net.eval()


def _barrier(a: nn.Module, b: nn.Module, test: Data, seen: Tensor) -> tuple[float, float]:
    """Return the largest excess of the loss on the line, and the accuracy at its middle."""
    measured = [_measured(_between(a, b, float(t), seen), test) for t in _SHARES]
    losses = torch.tensor([loss for loss, _ in measured])
    straight = torch.lerp(losses[:1], losses[-1:], _SHARES)
    return float((losses - straight).max()), measured[len(measured) // 2][1]


def _between(a: nn.Module, b: nn.Module, share: float, seen: Tensor) -> nn.Module:
    merged = copy.deepcopy(a)
    with torch.no_grad():
        pairs = zip(merged.parameters(), b.parameters(), strict=True)
        for p, q in pairs:
            p.lerp_(q, share)
        norms = [m for m in merged.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None
        if norms:
            merged.train()(seen)
    return merged.eval()


def _measured(net: nn.Module, test: Data) -> tuple[float, float]:
    with torch.no_grad():
        logits = torch.cat([net(x) for x in test[0].split(1000)])
    return float(cross_entropy(logits, test[1])), float(
        (logits.argmax(1) == test[1]).float().mean()
    )
