"""The tasks: a network, its data in three parts, and the optimizer it is usually trained with.

Rates are tuned on validation data only; test data are looked at once per run, at its end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.gpt import GPT
from benchmarks.evidence.text import split, windows
from onsphere.optim import SphereAdamW, SphereSGD
from onsphere.studies.engine.job import Inputs
from onsphere.studies.setup.data import Images
from onsphere.studies.setup.network import SmallConvNet

CONTEXT = 64
_VALIDATED = 128  # windows of text (8,192 characters)
_HELD_OUT = 2_000  # of the training images, for validation
_AT_ONCE = 500


@dataclass(frozen=True)
class Problem:
    """What one run works on.

    Args:
        model: the network.
        batches: inputs and targets of every step, without end.
        validation: inputs and targets.
        test: inputs and targets.
    """

    model: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Return mean cross-entropy (nats per label) and accuracy in eval mode."""
        self.model.eval()
        loss = right = 0.0
        for some_x, some_y in zip(x.split(_AT_ONCE), y.split(_AT_ONCE), strict=True):
            logits = self.model(some_x).flatten(0, -2)
            loss += float(F.cross_entropy(logits, some_y.flatten(), reduction="sum"))
            right += int((logits.argmax(-1) == some_y.flatten()).sum())
        self.model.train()
        return loss / y.numel(), right / y.numel()


@dataclass(frozen=True)
class Kind:
    """One task as a row of a table.

    Args:
        name: of the task, for tables and figures.
        images: the data set that workers load; a task on text has no use for it.
        base_name: of the base optimizer.
        make: builds the problem from width, batch, seed and the inputs of a cell.
        base: the base optimizer, from param groups and a rate.
        sphere: ours, likewise.
        width: of the network.
        batch: examples per step.
        steps: of every run.
        rates: of the base optimizer, and of ours.
        decays: of the base optimizer.
        rotations: of ours, radians per step. All three are where the search begins
            (:func:`~benchmarks.evidence.tuning.search`).
        cost: rough seconds per step on one core.
    """

    name: str
    images: str
    base_name: str
    make: Callable[[int, int, int, Inputs], Problem]
    base: Callable[..., torch.optim.Optimizer]
    sphere: Callable[..., torch.optim.Optimizer]
    width: int
    batch: int
    steps: int
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    rotations: tuple[float, ...]
    cost: float


def _gpt(width: int, batch: int, seed: int, inputs: Inputs) -> Problem:
    alphabet = inputs.records[0]["alphabet"]
    model = GPT(alphabet, context=CONTEXT, width=width, heads=max(1, width // 32), seed=seed)
    return of_text(model, inputs, batch, seed)


def of_text(
    model: nn.Module,
    inputs: Inputs,
    batch: int,
    seed: int,
    *,
    context: int = CONTEXT,
    validated: int = _VALIDATED,
) -> Problem:
    """Return the problem of predicting the next character.

    Args:
        model: gives logits for windows of characters.
        inputs: of a cell that needs the one of the text.
        batch: windows per step.
        seed: of where they begin.
        context: characters in a window.
        validated: windows of validation text, and of test text.
    """
    train, validation, test = split(inputs.tensors[0]["text"])
    held_out = [windows(part, context, validated) for part in (validation, test)]
    return Problem(
        model,
        _passages(train, batch, seed, context),
        *((part[:, :-1], part[:, 1:]) for part in held_out),
    )


def _passages(text: Tensor, batch: int, seed: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1)
    while True:
        start = torch.randint(len(text) - context, (batch, 1), generator=generator)
        found = text[start + torch.arange(context + 1)].long()
        yield found[:, :-1], found[:, 1:]


def _conv(width: int, batch: int, seed: int, inputs: Inputs) -> Problem:
    images: Images = inputs.images
    return of_images(SmallConvNet("bn", images, width=width, seed=seed), images, batch, seed)


def of_images(model: nn.Module, images: Images, batch: int, seed: int) -> Problem:
    """Return the problem of naming the class of an image; ``seed`` is of their order."""
    kept = len(images.train_y) - min(_HELD_OUT, len(images.train_y) // 6)
    return Problem(
        model,
        _shuffled(images.train_x[:kept], images.train_y[:kept], batch, seed),
        (images.train_x[kept:], images.train_y[kept:]),
        (images.test_x, images.test_y),
    )


class MLP(nn.Sequential):
    """Three linear layers, BatchNorm and ReLU behind the first two.

    A pixel that is 0 in every image gives its column of the first layer no gradient, ever.
    """

    def __init__(self, pixels: int, labels: int, *, width: int, seed: int) -> None:
        super().__init__(
            nn.Flatten(),
            *(nn.Linear(pixels, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            nn.Linear(width, labels),
        )
        generator = torch.Generator().manual_seed(seed)
        for layer in self:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _mlp(width: int, batch: int, seed: int, inputs: Inputs) -> Problem:
    images: Images = inputs.images
    labels = int(images.train_y.max()) + 1
    model = MLP(images.train_x[0].numel(), labels, width=width, seed=seed)
    return of_images(model, images, batch, seed)


def _shuffled(x: Tensor, y: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1)
    while True:
        order = torch.randperm(len(y), generator=generator)
        for index in order[: len(y) - len(y) % batch].split(batch):
            yield x[index], y[index]


def adamw(groups: list[dict[str, object]], lr: float) -> torch.optim.Optimizer:
    """Return AdamW as the tasks on text use it."""
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def sphere_adamw(groups: list[dict[str, object]], lr: float) -> torch.optim.Optimizer:
    """Return the same on spheres."""
    return SphereAdamW(groups, lr=lr, betas=(0.9, 0.99))


def sgd(groups: list[dict[str, object]], lr: float) -> torch.optim.Optimizer:
    """Return SGD as the tasks on images use it."""
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)


def sphere_sgd(groups: list[dict[str, object]], lr: float) -> torch.optim.Optimizer:
    """Return the same on spheres."""
    return SphereSGD(groups, lr=lr, momentum=0.9)


KINDS = {
    "conv": Kind(
        name="conv net on Fashion-MNIST",
        images="fashion-mnist",
        base_name="SGD",
        make=_conv,
        base=sgd,
        sphere=sphere_sgd,
        width=16,
        batch=64,
        steps=400,
        rates=(1e-2, 2e-2, 5e-2, 0.1, 0.2),
        decays=(0.0, 2e-3, 5e-3, 1e-2),
        rotations=(0.01, 0.02, 0.05, 0.1, 0.2),
        cost=0.02,
    ),
    "gpt": Kind(
        name="GPT on tiny Shakespeare",
        images="digits",
        base_name="AdamW",
        make=_gpt,
        base=adamw,
        sphere=sphere_adamw,
        width=64,
        batch=16,
        steps=300,
        rates=(2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
        decays=(0.0, 0.2, 0.5, 1.0),
        rotations=(0.01, 0.02, 0.05, 0.1, 0.2),
        cost=0.045,
    ),
    "mlp": Kind(
        name="MLP on MNIST",
        images="mnist",
        base_name="AdamW",
        make=_mlp,
        base=adamw,
        sphere=sphere_adamw,
        width=64,
        batch=128,
        steps=400,
        rates=(1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
        decays=(0.0, 0.05, 0.2, 0.5),
        rotations=(0.005, 0.01, 0.02, 0.05, 0.1),
        cost=0.004,
    ),
}
"""Every task by the key that the command line has for it."""
