"""Predictions 10, 11, 12 and 14 on a network that learns labels drawn at random, and 15.

The labels are drawn anew for every batch: noise dominates the gradients, as the laws assume, and
all else is a network's: layers that feed each other, gradients of unequal size, ReLU.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from benchmarks.laws import Measured, exponent
from benchmarks.predictions import Spheres, batch
from onsphere import dynamics as dyn
from onsphere.dynamics import Lion, NormRecorder
from onsphere.geometry import VectorAxes
from onsphere.robustness import accuracy, pgd

SIZES = (32, 32, 32, 5)


def run(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int,
    seed: int = 0,
    start: float = 1.0,
    lrs: Tensor | None = None,
    flip: bool = False,
) -> dict[str, Tensor]:
    """Train on noise; the recorder's series of every row of every weight but the last layer's.

    With ``flip`` every gradient is taken times a random sign, the same for all weights: whatever
    made successive gradients alike is gone, their sizes remain.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Spheres(SIZES)
    generator = torch.Generator().manual_seed(seed)
    weights = list(net.parameters())
    with torch.no_grad():
        for w in weights:
            w.mul_(start / w.norm(dim=1, keepdim=True))
    optimizer = make(weights)
    rows = {str(i): (w, VectorAxes((0,))) for i, w in enumerate(weights[:-1])}
    with NormRecorder(optimizer, rows, per_vector=True) as recorder:
        for step in range(steps):
            if lrs is not None:
                optimizer.param_groups[0]["lr"] = float(lrs[step])
            x, y = batch(generator, SIZES[0])
            optimizer.zero_grad()
            F.cross_entropy(net(x.float()), y).backward()
            if flip and torch.rand((), generator=generator) < 0.5:
                for w in weights:
                    w.grad.neg_()
            optimizer.step()
    series = [recorder.series(name) for name in recorder.names]
    return {key: torch.cat([s[key] for s in series], 1) for key in series[0] if key != "step"}


def _rms(angles: Tensor) -> float:
    return float(angles.square().mean().sqrt())


def free(seed: int = 0, steps: int = 1000) -> Iterator[Measured]:
    """10: without decay: the norm under SGD by its law, under Adam as t^(1/2).

    SGD's law is given the gradients as they came. Its exponent is asked for in
    :func:`fourth_root`: here the gradients shrink while the network learns what noise has to teach.
    """
    series = run(partial(SGD, lr=0.02), steps, seed, 0.1)
    unit_squares = series["gradient_square"] * series["norm"] ** 2
    law = dyn.free_growth(0.1, unit_squares, 0.02)[-2].pow(4).mean() ** 0.25
    norm = series["norm"].pow(4).mean(1)
    yield Measured("SGD", "10: norm at the end", float(law), float(norm[-1]) ** 0.25, 0.1)
    series = run(partial(Adam, lr=0.02, betas=(0.9, 0.95)), steps, seed, 2.0)
    law = dyn.adaptive_growth(2.0, torch.full((steps,), 0.02), SIZES[0])[-2]
    norm = series["norm"].pow(2).mean(1)
    yield Measured("Adam", "10: norm at the end", float(law), float(norm[-1]) ** 0.5, 0.1)
    yield Measured("Adam", "10: exponent", 0.5, exponent(norm) / 2, 0.1)


def fourth_root(seeds: range = range(3), steps: int = 4000) -> Iterator[Measured]:
    """10: the exponent 1/4 of SGD on a network, where the size of its gradients does not fall.

    Random signs keep the network from learning: without them the squared gradients of unit weights
    fall by a hundred in the same steps, and the norm stops.
    """
    found = []
    for seed in seeds:
        norm = run(partial(SGD, lr=1.0), steps, seed, flip=True)["norm"]
        found.append(exponent(norm.pow(4).mean(1)) / 4)
    yield Measured("SGD, random signs", "10: exponent", 0.25, sum(found) / len(found), 0.1)


def rotates(seed: int = 0, steps: int = 1500) -> Iterator[Measured]:
    """11, 12, and 13 as it is on a network: the rotation in equilibrium."""
    cases = (
        (
            "SGD, momentum 0.9",
            "11: rotation",
            dyn.sgd_equilibrium(lr=0.1, weight_decay=0.02, momentum=0.9),
            partial(SGD, lr=0.1, weight_decay=0.02, momentum=0.9),
            0.03,
        ),
        (
            "AdamW",
            "12: rotation",
            dyn.adamw_equilibrium(lr=0.02, weight_decay=0.5),
            partial(AdamW, lr=0.02, weight_decay=0.5),
            0.15,
        ),
        (
            "Lion",
            "13: rotation",
            dyn.lion_equilibrium(lr=0.01, weight_decay=1.0),
            partial(Lion, lr=0.01, weight_decay=1.0),
            0.15,
        ),
    )
    for name, quantity, law, make, tolerance in cases:
        series = run(make, steps, seed)
        measured = _rms(series["rotation"][steps // 2 :])
        yield Measured(name, quantity, law.rotation, measured, tolerance)


def drops(seed: int = 0, ratio: float = 10.0) -> Iterator[Measured]:
    """14: the rate divided by 10: rotation and gradient norm at once, and after the recovery."""
    lr, decay = 0.5, 0.02
    make = partial(SGD, lr=lr, weight_decay=decay)
    first, recovery = 600, 1600
    lrs = torch.full((first + recovery,), lr)
    lrs[first:] /= ratio
    series = run(make, len(lrs), seed, lrs=lrs)
    spans = {
        "before": slice(first // 2, first),
        "at once": slice(first, first + 20),
        "at last": slice(-300, None),
    }
    law = {"before": 1.0, "at once": 1 / ratio, "at last": ratio**-0.5}
    settled = dyn.sgd_equilibrium(lr=lr, weight_decay=decay).rotation
    # Pythagoras: mean angle**2 = 2 lr decay + growth of ln |w|^2 per step, also out of balance.
    for when, span in spans.items():
        turned = _rms(series["rotation"][span])
        yield Measured("SGD, rate / 10", f"14: rotation {when}", settled * law[when], turned, 0.1)
    late = series["norm"][spans["at last"]]
    drift = float((late[-1] / late[0]).log().mean() * 2 / (len(late) - 1))
    law_of_drift = (2 * lr / ratio * decay + drift) ** 0.5
    quantity = "14: rotation at last, drift of the norm counted"
    yield Measured("SGD, rate / 10", quantity, law_of_drift, turned, 0.02)


def attacked(seed: int = 0) -> dict[str, float]:
    """15: robust accuracy under a gauge rescale, and under a scale of the logits."""
    images, labels = _digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
        ).double()
    generator = torch.Generator().manual_seed(seed)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(300):
        index = torch.randint(1000, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(images[index]), labels[index]).backward()
        optimizer.step()
    net.eval().requires_grad_(False)
    x, y = images[1000:1400], labels[1000:1400]

    def robust(model: Callable[[Tensor], Tensor], loss: str) -> float:
        noise = torch.Generator().manual_seed(seed)
        return accuracy(model, pgd(model, x, y, eps=0.1, loss=loss, generator=noise), y)

    found = {f"{loss}, logits × 1": robust(net, loss) for loss in ("cross_entropy", "dlr")}
    for loss in ("cross_entropy", "dlr"):
        found[f"{loss}, logits × 10000"] = robust(lambda z: 10000 * net(z), loss)
    linear, norm = net[0], net[1]
    linear.weight.mul_(8.0)
    linear.bias.mul_(8.0)
    norm.running_mean.mul_(8.0)
    norm.running_var.add_(norm.eps).mul_(64.0).sub_(norm.eps)
    for loss in ("cross_entropy", "dlr"):
        found[f"{loss}, weights × 8"] = robust(net, loss)
    return found


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data) / 16, torch.from_numpy(data.target)
