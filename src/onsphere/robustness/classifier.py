"""A model as attacks take it: from inputs in the units of the data to logits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def logits_of(result: Any) -> Any:
    """Pick the logits of what a model returned.

    Args:
        result: a tensor; an object with ``logits``, as Hugging Face's ``ModelOutput``; a mapping
            with ``"logits"``, or with one matrix of floats; a tuple or list of one tensor.

    Returns:
        The tensor, or ``result`` as it is where it holds none or several that could be meant.

    Example:
        >>> logits_of({"loss": torch.tensor(1.0), "logits": torch.ones(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(result, Tensor):
        return result
    named = result["logits"] if _has_logits(result) else getattr(result, "logits", None)
    if isinstance(named, Tensor):
        return named
    held: list[Any] = []
    if isinstance(result, Mapping):
        held = [value for value in result.values() if is_matrix(value)]
    elif isinstance(result, tuple | list):
        held = list(result)
    return held[0] if len(held) == 1 and isinstance(held[0], Tensor) else result


def _has_logits(result: object) -> bool:
    return isinstance(result, Mapping) and "logits" in result


def described(result: object) -> str:
    """Say in words what a model returned that has no logits."""
    if isinstance(result, Mapping):
        return f"a {type(result).__name__} with {', '.join(map(repr, result)) or 'nothing in it'}"
    return f"a {type(result).__name__}"


def is_matrix(value: object) -> bool:
    """Whether something is a matrix of floats, as logits are."""
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


class Classifier(nn.Module):
    r"""A model with the data's normalization inside: :math:`x \mapsto f((x - m)/s)`.

    A radius is in the units of the data, so what training applied to the data belongs to the
    model. Where the model returns several things, its logits are taken (:func:`logits_of`).

    Args:
        model: the model.
        mean: what to subtract: one number, or one per channel.
        std: what to divide by.
        dtype: what the model takes, if not the dtype of the inputs. A radius below the resolution
            of half precision needs inputs in a finer one.

    Raises:
        ValueError: ``mean`` is not finite, or ``std`` not positive and finite.

    Example:
        >>> net = Classifier(nn.Flatten(), mean=[0.5], std=[0.25])
        >>> net(torch.ones(1, 1, 1, 2))
        tensor([[2., 2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not all(map(math.isfinite, mean)):
            raise ValueError(f"mean must be finite, got {list(mean)}")
        if not all(0 < s < math.inf for s in std):
            raise ValueError(f"std must be positive and finite, got {list(std)}")
        self.model, self.dtype = model, dtype
        # Not a part of the state: nothing to train, and no scale of the model's own.
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self.train(model.training)

    def forward(self, x: Tensor) -> Any:
        """Return the model's logits, or what it returns in their place."""
        mean, std = (self._along_channels(v, x) for v in (self.mean, self.std))
        result = self.model(((x - mean) / std).to(self.dtype or x.dtype))
        return logits_of(result)

    def _along_channels(self, values: Tensor, x: Tensor) -> Tensor:
        return values.to(x).reshape(-1, *([1] * (x.ndim - 2)))
