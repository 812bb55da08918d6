"""DoRA: weight normalization of a frozen weight plus a low-rank update."""

import math

from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from onsphere.geometry import VectorAxes, vector_norm
from onsphere.norms.modules.channels import positive


class LowRankDirection(nn.Module):
    r"""The parametrization of :func:`dora`: lengths, and a low-rank update of the directions.

    Args:
        weight: the frozen weight ``(out, in, *kernel)``.
        rank: of the update.
        alpha: the update is multiplied by ``alpha / rank``.
        detach_norm: the length that divides is a constant to the gradient.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, detach_norm: bool) -> None:
        super().__init__()
        rows = weight.detach().flatten(1)
        self.scale, self.detach_norm = alpha / rank, detach_norm
        self.magnitude = nn.Parameter(vector_norm(rows).clone())
        self.lora_A = nn.Parameter(rows.new_empty(rank, rows.shape[1]))
        self.lora_B = nn.Parameter(rows.new_zeros(rows.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight: lengths times directions."""
        axes = VectorAxes(index=(0,))
        direction = axes.gather(weight) + self.scale * (self.lora_B @ self.lora_A)
        length = vector_norm(direction)
        length = length.detach() if self.detach_norm else length
        return axes.scatter(self.magnitude * (direction / length), weight.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Keep the weight as what is updated."""
        return weight


def dora(
    module: nn.Module,
    name: str = "weight",
    *,
    rank: int,
    alpha: float | None = None,
    detach_norm: bool = False,
) -> nn.Module:
    r"""Adapt a frozen weight by length and direction, in place: :math:`W' = m\,\frac{V}{|V|}`.

    :math:`V = W + \frac{\alpha}{r} B A`, its length taken per row (per output, as PEFT does), ``W``
    frozen; trained are the lengths ``m``, which start at :math:`|W|`, and ``A`` and ``B``, which
    start at an update of zero. A row of :math:`V` has a sphere: its scale changes nothing. What is
    trained has none, for ``W`` is fixed; ``A`` and ``B`` trade their scales.

    Args:
        module: the layer.
        name: its weight, with at least two axes.
        rank: of the update, :math:`r`.
        alpha: :math:`\alpha`; ``rank`` if not given, a factor of 1.
        detach_norm: take :math:`|V|` as a constant in the backward pass, as the paper proposes to
            save memory (section 4.3). Gradients then have a radial part.

    Returns:
        The same module. Merge by ``torch.nn.utils.parametrize.remove_parametrizations``.

    Raises:
        ValueError: no such weight, fewer than two axes, or a rank below 1.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(5, 3)
        >>> before = layer.weight.clone()
        >>> torch.allclose(dora(layer, rank=2).weight, before)    # the update starts at zero
        True
        >>> sorted(n.split(".")[-1] for n, p in layer.named_parameters() if p.requires_grad)
        ['bias', 'lora_A', 'lora_B', 'magnitude']

    Source: Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, 2024 (arXiv 2402.09353),
    equation 5.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise ValueError(
            f"{type(module).__name__} has no weight {name!r} with at least two axes to adapt"
        )
    positive("rank", rank)
    weight.requires_grad_(False)
    update = LowRankDirection(weight, rank, float(rank if alpha is None else alpha), detach_norm)
    torch_parametrize.register_parametrization(module, name, update)
    return module
