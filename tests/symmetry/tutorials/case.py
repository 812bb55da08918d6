"""One row of the table: a small model as people write it, and what is free about its scales."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Exponents = Mapping[str, int | Fraction]


@dataclass(frozen=True)
class Case:
    """A model, how it is called, and the right answer.

    Args:
        name: unique in the table.
        make: builds the model; the seed is set before.
        inputs: draws positional and keyword inputs; the seed is set before.
        symmetries: with ``inert``, a basis of all scale symmetries of whole parameters. Persistent
            float buffers appear where they have to move along.
        spheres: parameters whose scale does nothing by itself, although their direction does.
        inert: parameters that cannot affect the output, whatever inputs of that kind are given.
        granularity: how finely the sphere of a parameter divides, where that is clear.
        mode: ``"train"`` or ``"eval"``.
        limits: the audit must say that it tried inputs of other lengths.
        unreached: parameters that this input does not reach and others do; no claim need be made.
        rich: draws inputs of the same kind that show everything, where ``inputs`` does not.
        jumps: the function is locally constant in a weight; derivatives do not tell about it.
        note: why, where it is not obvious.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    symmetries: tuple[Exponents, ...] = ()
    spheres: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    granularity: Mapping[str, str] = field(default_factory=dict)
    mode: str = "eval"
    limits: bool = False
    unreached: tuple[str, ...] = ()
    rich: Callable[[], Inputs] | None = None
    jumps: bool = False
    note: str = ""

    @property
    def basis(self) -> list[Exponents]:
        """All symmetries, those of the inert parameters among them."""
        return [*self.symmetries, *({name: 1} for name in self.inert)]

    def model(self) -> nn.Module:
        """Build the model in its mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().train(self.mode == "train")

    def given(self) -> Inputs:
        """Draw the inputs of the audit."""
        return drawn(self.inputs, 0)


def drawn(inputs: Callable[[], Inputs], seed: int) -> Inputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inputs()


def call(*args: Any, **kwargs: Any) -> Inputs:
    return args, kwargs


def names(words: str) -> list[str]:
    """Split at spaces; ``fc.*`` stands for weight and bias of ``fc``."""
    found: list[str] = []
    for word in words.split():
        stem = word.removesuffix("*")
        found += [f"{stem}weight", f"{stem}bias"] if word.endswith("*") else [word]
    return found


def trade(up: str, down: str = "") -> Exponents:
    """What is named first grows and what is named second shrinks by the same factor."""
    return {**dict.fromkeys(names(up), 1), **dict.fromkeys(names(down), -1)}


def chain(words: str) -> tuple[Exponents, ...]:
    """Layers with homogeneous activations between them: each trades with the next."""
    layers = words.split()
    pairs = itertools.pairwise(layers)
    return tuple(trade(f"{a}.*", f"{b}.weight") for a, b in pairs)


def tokens(*shape: int, among: int) -> Tensor:
    return torch.randint(0, among, shape)
