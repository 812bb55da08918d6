"""Training one network: the cell that most claims build on."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from onsphere.dynamics import NormRecorder
from onsphere.errors import OnsphereError
from onsphere.geometry import Sphere
from onsphere.norms import ActivationNorm
from onsphere.optim import SphereSGD, project_
from onsphere.studies.engine.job import Cell, Config, Inputs, Outcome, Task
from onsphere.studies.setup.architectures import architecture
from onsphere.studies.setup.data import Images
from onsphere.studies.setup.network import Network

Space = Literal["plain", "sphere"]
Part = Literal["hidden", "head", "rest"]
Mode = Literal["rate", "relative", "angle"]
Decayed = Literal["all", "hidden", "head"]

DECAY = 5e-3
"""Weight decay of the runs that have one, on all weights (not gains, shifts or biases)."""

RECORDED = ("norm", "gradient_square", "rotation")
"""What a recorded run keeps of every step and vector, of what a recorder measures."""

MEASURED = 1000
"""On so many training images, at most, loss and accuracy are measured."""

_SNAPSHOTS = {"tenth": 10, "third": 3}
"""Snapshots of a recorded run: into how many parts its steps are divided, of which one is over."""


@dataclass(frozen=True)
class Training:
    """How one network is trained: SGD with momentum, cross-entropy, constant or cosine rate.

    Args:
        data: name of the data set.
        method: a name of :data:`~onsphere.studies.setup.network.STUDIED`.
        space: ``"plain"`` SGD, or ``"sphere"``: hidden weights keep their initial lengths.
        lr: learning rate.
        weight_decay: on weights (not gains, shifts or biases), coupled as in ``torch.optim.SGD``.
        momentum: momentum factor.
        schedule: ``"constant"``, or ``"cosine"`` down to 0 at the last step.
        steps: number of steps.
        batch: images per step.
        width: width of the network.
        seed: of the initial weights and of the order of the data.
        objective: cross-entropy with the ``"labels"``, or ``"noise"``: the inner product of the
            logits with normal random numbers drawn anew at every step, while only the hidden
            weights are trained. Its gradient has mean zero at every weight, so it is the
            uncorrelated noise that the laws of the mean speak of.
        record: keep norms, squared gradient norms and rotations of hidden weights at every step,
            and snapshots: the network after a tenth and a third of the steps.
        norm_growth: on the sphere: its radius grows by this factor during the run, as
            :func:`grown` says. The rate grows with its square, so that the weights turn as they
            would without.
        rate_growth: on the sphere: the effective rate of the hidden weights falls as if their
            norms had grown by this factor. Where both are given and equal, the rate is constant
            and the norms grow: what happens in plain training, but forced.
        head: ``"sphere"`` keeps the head's weight at its initial length too.
        network: a name of :data:`~onsphere.studies.setup.architectures.ARCHITECTURES`.
        start_scale: the hidden weights start so many times as large.
        lr_mode: on the sphere: what the rate means, as for
            :class:`~onsphere.optim.SphereSGD`: ``"rate"`` as in plain SGD, ``"relative"`` to the
            length, ``"angle"`` in radians per step.
        radius: on the sphere: the length that every vector of the hidden weights gets before the
            first step; ``None`` for the one that it starts with.
        decayed: which weights decay: ``"all"``, the ``"hidden"`` ones or the ``"head"`` alone.

    Raises:
        ValueError: something is asked for that exists on the sphere only, or growth is forced
            where the rate does not mean what it does in plain SGD.
    """

    data: str
    method: str
    space: Space = "plain"
    lr: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: Literal["constant", "cosine"] = "constant"
    steps: int = 300
    batch: int = 64
    width: int = 8
    seed: int = 0
    objective: Literal["labels", "noise"] = "labels"
    record: bool = False
    norm_growth: float = 1.0
    rate_growth: float = 1.0
    head: Literal["free", "sphere"] = "free"
    network: str = "small"
    start_scale: float = 1.0
    lr_mode: Mode = "rate"
    radius: float | None = None
    decayed: Decayed = "all"

    def __post_init__(self) -> None:
        grows = (self.norm_growth, self.rate_growth) != (1.0, 1.0)
        if (grows or self.head != "free") and self.space != "sphere":
            raise ValueError("growth is forced, and the head is held, on the sphere only")
        if (self.lr_mode != "rate" or self.radius is not None) and self.space != "sphere":
            raise ValueError("lr_mode and radius are of the sphere: give space='sphere' too")
        if grows and (self.lr_mode != "rate" or self.radius is not None):
            raise ValueError("growth is forced with lr_mode='rate' and no radius only")

    def progress(self, step: int) -> float:
        """Return the share of the run that is done before a step (counted from 0)."""
        return step / max(1, self.steps)

    def cell(self) -> Cell:
        """Return the cell that trains this network."""
        step = architecture(self.network).cost * (1.2 if self.record else 1)
        return Cell(TRAIN, asdict(self), cost=self.steps * step)


def train(config: Config, inputs: Inputs) -> Outcome:
    """Train, then measure loss and accuracy; keep the network (and its series, if recorded)."""
    settings = Training(**config)
    images = inputs.images
    model = network_for(settings, images)
    if settings.objective == "noise":
        model.requires_grad_(False)
        for weight, _ in model.hidden_weights().values():
            weight.requires_grad_(True)
    optimizer = optimizer_for(model, settings)
    recorder = (
        NormRecorder(optimizer, model.hidden_weights(), per_vector=True)
        if settings.record
        else None
    )
    noise = torch.Generator().manual_seed(settings.seed + 2)
    losses: list[float] = []
    kept: dict[str, Tensor] = {}
    for step, index in enumerate(batches(len(images.train_y), settings)):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(settings, step, group["part"])
        optimizer.zero_grad()
        logits = model(images.train_x[index])
        if settings.objective == "noise":
            loss = (logits * torch.randn(logits.shape, generator=noise)).sum(1).mean()
        else:
            loss = F.cross_entropy(logits, images.train_y[index])
        losses.append(float(loss.detach()))
        if not _is_finite(loss):
            break
        loss.backward()
        optimizer.step()
        if settings.norm_growth != 1:
            enlarge(optimizer, growth_in(settings, step))
        for name in snapshots_after(settings, step):
            kept |= {f"{name}.{key}": value.clone() for key, value in model.state_dict().items()}
    outcome = outcome_of(measure(model, images), model.state_dict(), losses)
    outcome.tensors.update(kept)
    if recorder is not None:
        recorder.detach()
        for name in model.hidden_weights():
            series = recorder.series(name)
            for quantity in RECORDED:
                outcome.tensors[f"series.{name}.{quantity}"] = series[quantity].float()
    return outcome


def snapshots_after(settings: Training, step: int) -> list[str]:
    """Return which snapshots a run takes after a step (counted from 0): names, mostly none."""
    ends = {name: max(2, settings.steps // part) for name, part in _SNAPSHOTS.items()}
    return [name for name, end in ends.items() if settings.record and end == step + 1]


def restore_snapshots(settings: Training, inputs: Inputs) -> list[Network]:
    """Return the network of a recorded run at a tenth, a third and all of its steps.

    Args:
        settings: how it was trained.
        inputs: the first needed cell's tensors hold the networks.

    Raises:
        OnsphereError: the network diverged.
    """
    return [restore(settings, inputs, part=part) for part in (*_SNAPSHOTS, "model")]


def outcome_of(measured: dict[str, Any], state: dict[str, Tensor], losses: list[float]) -> Outcome:
    """Return what a training gives, series and snapshots aside.

    Args:
        measured: loss and accuracy at its end.
        state: the network at its end.
        losses: of all steps, the last of which may be no number.
    """
    result = {"steps_done": len(losses), "loss_curve": _thin(losses), **measured}
    return Outcome(result, {f"model.{name}": value for name, value in state.items()})


@torch.no_grad()
def network_for(settings: Training, images: Images, *, eps: float | None = None) -> Network:
    """Return the network that a training starts from.

    Args:
        settings: give network, method, width, seed and scale of the start.
        images: the data set; the network has their dtype.
        eps: eps of the method; ``None`` takes its default.

    Raises:
        OnsphereError: no such network, or a method that makes no sense in it.
    """
    build = architecture(settings.network).build
    model = build(settings.method, images, width=settings.width, seed=settings.seed, eps=eps)
    model = model.to(images.train_x.dtype)  # before the radius, which has that precision then
    for weight, _ in model.hidden_weights().values():
        weight.mul_(settings.start_scale)
    if settings.radius is not None and not model.joint:
        for weight, axes in model.hidden_weights().values():
            project_(weight, Sphere(axes, settings.radius))
    return model


def optimizer_for(model: Network, settings: Training) -> torch.optim.Optimizer:
    """Return the optimizer of the settings: hidden weights on spheres, or everything plain."""
    hidden = model.hidden_weights()
    others = model.other_weights()
    weights = {id(p) for p in (model.head.weight, *others, *(p for p, _ in hidden.values()))}
    # By name and not by shape: the gains and shifts of LN and RMS have three axes.
    gains_and_biases = [p for p in model.parameters() if id(p) not in weights]
    decay = decay_of(settings, "hidden")
    head: dict[str, Any] = {"params": [model.head.weight], "part": "head"}
    head["weight_decay"] = decay_of(settings, "head")
    rest: dict[str, Any] = {"params": gains_and_biases, "weight_decay": 0.0, "part": "rest"}
    groups = [head, rest]
    if others:
        groups.append({"params": others, "weight_decay": decay, "part": "rest"})
    if settings.space == "plain":
        plain = {"params": [p for p, _ in hidden.values()], "weight_decay": decay, "part": "hidden"}
        groups.append(plain)
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=True)
    if settings.head == "sphere":
        head |= {"sphere": Sphere(), "weight_decay": 0.0}
    held = [([parameter], Sphere(axes, settings.radius)) for parameter, axes in hidden.values()]
    if model.joint:
        held = [([parameter for parameter, _ in hidden.values()], _joint(settings))]
    groups += [
        {"params": params, "sphere": sphere, "weight_decay": 0.0, "part": "hidden"}
        for params, sphere in held
    ]
    return SphereSGD(groups, lr=settings.lr, momentum=settings.momentum, lr_mode=settings.lr_mode)


def _joint(settings: Training) -> Sphere:
    return Sphere(radius=settings.radius, joint=True)


def grown(factor: float, progress: float) -> float:
    r"""Return how much a norm has grown on its way to ``factor`` times its length.

    :math:`(1 + (f^4 - 1)\,t)^{1/4}`, the law of SGD without weight decay under gradients of
    constant size (its fourth power is linear in time).

    Args:
        factor: final over initial length.
        progress: share of the run, from 0 to 1.

    Example:
        >>> [round(grown(2.0, t), 3) for t in (0.0, 0.5, 1.0)]
        [1.0, 1.707, 2.0]
    """
    return (1 + (factor**4 - 1) * progress) ** 0.25


def growth_in(settings: Training, step: int) -> float:
    """Return by how much the norm grows in a step (counted from 0)."""
    before, after = (grown(settings.norm_growth, settings.progress(k)) for k in (step, step + 1))
    return after / before


@torch.no_grad()
def enlarge(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Move the hidden weights to spheres ``factor`` times as large, their momentum along.

    Gradients at the new points are ``factor`` times smaller, and so is the momentum made.

    Args:
        optimizer: of :func:`optimizer_for`, on spheres.
        factor: new over old radius.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["part"] == "hidden" else ():
            state = optimizer.state[parameter]
            parameter.mul_(factor)
            if "radius" in state:  # the first tensor of a joint sphere keeps it for all
                state["radius"].mul_(factor)
            if "momentum_buffer" in state:
                state["momentum_buffer"].div_(factor)


def batches(count: int, settings: Training) -> Iterator[Tensor]:
    """Yield the indices of every step's batch: epochs of shuffled data, last short batch dropped.

    Args:
        count: how many training images there are; a larger batch takes all of them.
        settings: gives the number of steps, the batch and the seed.
    """
    generator = torch.Generator().manual_seed(settings.seed + 1)
    done, size = 0, min(settings.batch, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for index in torch.split(order[: count - count % size], size):
            if done == settings.steps:
                return
            yield index
            done += 1


def rate_at(settings: Training, step: int, part: Part = "rest") -> float:
    """Return the learning rate of a part of the network in a step (counted from 0)."""
    rate = settings.lr * share_at(settings, step)
    if part != "hidden":
        return rate
    norm, slowing = (
        grown(factor, settings.progress(step))
        for factor in (settings.norm_growth, settings.rate_growth)
    )
    return rate * (norm / slowing) ** 2


def share_at(settings: Training, step: int) -> float:
    """Return the share of its first rate that the schedule leaves in a step (counted from 0)."""
    if settings.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * settings.progress(step))) / 2


def decay_of(settings: Training, part: Part) -> float:
    """Return the weight decay of a part of the network (0 for gains, shifts and biases)."""
    decays = part != "rest" and settings.decayed in ("all", part)
    return settings.weight_decay if decays else 0.0


@torch.no_grad()
def measure_statistics(model: Network, images: Images, settings: Training) -> Network:
    """Measure BatchNorm's running statistics anew: a mean over at most 50 batches.

    Args:
        model: changed in place; left in eval mode.
        images: gives the batches.
        settings: gives their size and order.

    Returns:
        The model.
    """
    norms = [n for n in model.norms if isinstance(n, ActivationNorm) and n.track_running_stats]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
        for buffer in (norm.running_mean, norm.running_var, norm.num_batches_tracked):
            assert buffer is not None
            buffer.zero_()
    model.train()
    many = min(50, settings.steps) if norms else 0
    for index in islice(batches(len(images.train_y), settings), many):
        model(images.train_x[index])
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    return model.eval()


@torch.no_grad()
def measure(model: Network, images: Images) -> dict[str, Any]:
    """Loss and accuracy in eval mode; ``None`` and chance where the network holds no number.

    Args:
        model: the network; left in eval mode.
        images: the data set.
    """
    model.eval()
    return measure_logits(model(images.train_x[:MEASURED]), model(images.test_x), images)


def measure_logits(train: Tensor, test: Tensor, images: Images) -> dict[str, Any]:
    """Loss and accuracy, from the logits of the first training images and of all test images."""
    labels = images.train_y[:MEASURED]
    loss = F.cross_entropy(train, labels)
    finite = _is_finite(loss)
    return {
        "diverged": not finite,
        "train_loss": float(loss) if finite else None,
        "train_accuracy": _accuracy(train.argmax(1), labels, finite, images),
        "test_accuracy": _accuracy(test.argmax(1), images.test_y, finite, images),
    }


def restore(
    settings: Training, inputs: Inputs, eps: float | None = None, *, part: str = "model"
) -> Network:
    """Return the trained network of a cell that builds on one, in eval mode.

    Args:
        settings: how it was trained.
        inputs: the first needed cell's tensors hold the network.
        eps: another eps for the method than the one it was trained with.
        part: which of the kept networks: ``"model"`` for the one at the end.

    Raises:
        OnsphereError: the network diverged in training, so there is nothing to measure on it.
    """
    if inputs.records[0]["diverged"]:
        raise OnsphereError(
            f"the network with method {settings.method!r}, seed {settings.seed}, diverged while "
            f"training on {settings.data}; claims that measure trained networks cannot be tested "
            "there. Name the other claims, or other --seeds"
        )
    model = network_for(settings, inputs.images, eps=eps)
    prefix = f"{part}."
    state = {
        k.removeprefix(prefix): v for k, v in inputs.tensors[0].items() if k.startswith(prefix)
    }
    model.load_state_dict(state)
    return model.eval()


def _accuracy(predicted: Tensor, y: Tensor, finite: bool, images: Images) -> float:
    return float((predicted == y).float().mean()) if finite else 1 / images.classes


def _is_finite(loss: Tensor) -> bool:
    return bool(loss.isfinite())


def _thin(values: list[float], most: int = 60) -> list[list[float]]:
    """Keep at most ``most`` finite (step, loss) pairs, evenly spread."""
    stride = max(1, len(values) // most)
    return [[i, v] for i, v in enumerate(values) if i % stride == 0 and abs(v) < float("inf")]


TRAIN = Task("train", 4, train)
