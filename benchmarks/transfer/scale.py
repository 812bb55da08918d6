"""The networks, their small sizes, the axes they grow along, and what is tuned on each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from benchmarks.evidence import problem
from benchmarks.evidence.gpt import GPT
from benchmarks.evidence.gpt_prenorm import PreNormGPT
from benchmarks.evidence.problem import Problem
from onsphere.studies.engine.job import Inputs
from onsphere.studies.setup.network import SmallConvNet

Axis = Literal["width", "depth", "batch", "steps"]
AXES: tuple[Axis, ...] = get_args(Axis)

Method = Literal["plain", "hidden", "own", "maximal", "every"]
"""What one number is tuned: a rate of all weights (``"plain"``) or of the hidden matrices alone
(``"hidden"``), or a rotation of the weights on spheres of their own (``"own"``), of those that the
audit holds without losing a function (``"maximal"``), or of every hidden matrix (``"every"``)."""

RATES: tuple[Method, ...] = ("plain", "hidden")
CONTEXT, _HEAD = 32, 16
_VALIDATED = 256  # windows of text (8,192 characters)


@dataclass(frozen=True)
class Size:
    """How large a network and its training are.

    Args:
        width: of the network.
        depth: blocks of a GPT; convolutions of each width of the conv net.
        batch: examples per step.
        steps: how many.
    """

    width: int
    depth: int
    batch: int
    steps: int

    def times(self, factor: int, axis: Axis) -> "Size":
        """Return the size that is so many times as large along one axis."""
        return replace(self, **{axis: factor * getattr(self, axis)})


@dataclass(frozen=True)
class Kind:
    """One network as a row of a table.

    Args:
        name: for tables and figures.
        images: the data set that workers load; a task on text has no use for it.
        reads_text: whether it works on the text.
        base_name: of the optimizer of all weights that are not on spheres.
        make: builds the problem from size, seed and the inputs of a cell.
        base: that optimizer, from param groups and a rate.
        sphere: ours, likewise.
        methods: what is tuned.
        size: of the small model.
        largest: factor along an axis, where the largest of all is too much.
        decays: of the base optimizer, tuned at the small size.
        rate: where the search for its rate begins.
        rotation: where that for rotations begins.
        chance: loss of a uniform guess; no run counts as worse.
        cost: rough seconds per step of the small model on one core.
    """

    name: str
    images: str
    reads_text: bool
    base_name: str
    make: Callable[[Size, int, Inputs], Problem]
    base: Callable[..., torch.optim.Optimizer]
    sphere: Callable[..., torch.optim.Optimizer]
    methods: tuple[Method, ...]
    size: Size
    largest: dict[Axis, int]
    decays: tuple[float, ...]
    rate: float
    rotation: float
    chance: float
    cost: float

    @property
    def rotations(self) -> tuple[Method, ...]:
        """The methods that tune a rotation."""
        return tuple(method for method in self.methods if method not in RATES)

    def factors(self, axis: Axis, factors: Sequence[int]) -> list[int]:
        """Return those factors that are asked along an axis, in order."""
        return sorted(factor for factor in factors if factor <= self.largest.get(axis, factor))


def _of_text(network: Any, size: Size, seed: int, inputs: Inputs) -> Problem:
    model = network(
        inputs.records[0]["alphabet"],
        context=CONTEXT,
        width=size.width,
        heads=max(1, size.width // _HEAD),
        depth=size.depth,
        seed=seed,
    )
    return problem.of_text(model, inputs, size.batch, seed, context=CONTEXT, validated=_VALIDATED)


def _gpt(size: Size, seed: int, inputs: Inputs) -> Problem:
    return _of_text(GPT, size, seed, inputs)


def _prenorm(size: Size, seed: int, inputs: Inputs) -> Problem:
    return _of_text(PreNormGPT, size, seed, inputs)


def _conv(size: Size, seed: int, inputs: Inputs) -> Problem:
    images = inputs.images
    model = SmallConvNet("bn", images, width=size.width, depth=size.depth, seed=seed)
    return problem.of_images(model, images, size.batch, seed)


_OF_TEXT = Kind(
    name="GPT",
    images="digits",
    reads_text=True,
    base_name="AdamW",
    make=_gpt,
    base=problem.adamw,
    sphere=problem.sphere_adamw,
    methods=("plain", "hidden", "own"),
    size=Size(width=32, depth=2, batch=8, steps=128),
    largest={"depth": 4, "steps": 4},
    decays=(0.0, 0.25, 1.0, 4.0),
    rate=2**-6,
    rotation=2**-5,
    chance=4.174,  # 65 characters
    cost=0.006,
)

KINDS = {
    "gpt": _OF_TEXT,
    "prenorm": replace(
        _OF_TEXT,
        name="pre-norm GPT",
        make=_prenorm,
        methods=("plain", "hidden", "maximal", "every"),
    ),
    "conv": Kind(
        name="conv net",
        images="fashion-mnist",
        reads_text=False,
        base_name="SGD",
        make=_conv,
        base=problem.sgd,
        sphere=problem.sphere_sgd,
        methods=("plain", "hidden", "own"),
        size=Size(width=8, depth=1, batch=32, steps=128),
        largest={},
        decays=(0.0, 2**-10, 2**-8, 2**-6),
        rate=2**-4,
        rotation=2**-5,
        chance=2.303,  # ten classes
        cost=0.003,
    ),
}
"""Every network by the key that the command line has for it."""
