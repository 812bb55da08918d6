"""Dynamic tanh: an activation in the place of a normalization."""

import torch
from torch import Tensor, nn


class DynamicTanh(nn.Module):
    r"""DyT: :math:`y = \gamma\,\tanh(\alpha x) + \beta`.

    It has no statistics and forgets nothing: the scale of a weight before it counts, so there is
    no sphere. Weight and bias before it trade their scale with :math:`\alpha`.

    Args:
        size: the trailing shape that gain and shift have (an int or a tuple), as for LayerNorm.
        alpha: where the one learned factor starts.

    Shape: input and output ``(*batch, *size)``.

    Raises:
        ValueError: a size that is not positive; in ``forward``, another trailing shape.

    Example:
        >>> import torch
        >>> DynamicTanh(2, alpha=1.0)(torch.tensor([0.0, 100.0])).tolist()
        [0.0, 1.0]

    Source: Zhu et al., *Transformers without Normalization*, 2025 (arXiv 2503.10622), section 4.
    """

    def __init__(self, size: int | tuple[int, ...], *, alpha: float = 0.5) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if not self.size or any(extent < 1 for extent in self.size):
            raise ValueError(f"dynamic tanh needs a positive size, got {size}")
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.weight = nn.Parameter(torch.ones(self.size))
        self.bias = nn.Parameter(torch.zeros(self.size))

    def forward(self, x: Tensor) -> Tensor:
        """Squash, scale and shift."""
        if tuple(x.shape[x.ndim - len(self.size) :]) != self.size:
            raise ValueError(f"dynamic tanh expects (*batch, *{self.size}), got {tuple(x.shape)}")
        return self.weight * torch.tanh(self.alpha * x) + self.bias

    def extra_repr(self) -> str:
        """Return the size."""
        return str(self.size)
