"""Global response normalization, and the threshold that follows FilterResponseNorm."""

import torch
from torch import Tensor, nn

from onsphere.norms.modules.channels import check_channels, per_channel, positive


class GlobalResponseNorm(nn.Module):
    r"""GRN of ConvNeXt V2: :math:`y = x + \gamma\,x\,n + \beta`, a share :math:`n` per channel.

    :math:`n_c = |x_c|/\overline{|x|}`: the norm of channel ``c`` over space, over the mean of these
    norms. What is normalized is the factor :math:`n`, so the output grows as the input does
    (degree 1): no weight before it lives on a sphere.

    Args:
        num_features: number of channels.
        eps: added to the mean norm.

    Shape: input and output ``(batch, channel, *space)``; the paper's code has channels last.

    Raises:
        ValueError: in ``forward``, another number of channels.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 2, 3)
        >>> norm = GlobalResponseNorm(2)
        >>> bool((norm(x) == x).all())                            # gain and shift start at 0
        True

    Source: Woo et al., *ConvNeXt V2*, 2023 (arXiv 2301.00808), section 3.2 and algorithm 1.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_features, self.eps = positive("num_features", num_features), eps
        self.weight, self.bias = (nn.Parameter(torch.zeros(num_features)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply each channel by its share of the response, beside the identity."""
        check_channels("GRN", x, self.num_features)
        axes = tuple(range(2, x.ndim))
        norms = torch.linalg.vector_norm(x, dim=axes, keepdim=True) if axes else x.abs()
        share = norms / (norms.mean(1, keepdim=True) + self.eps)
        return x + per_channel(self.weight, x) * (x * share) + per_channel(self.bias, x)

    def extra_repr(self) -> str:
        """Return the options that were chosen."""
        return f"{self.num_features}, eps={self.eps}"


class ThresholdedLinearUnit(nn.Module):
    r"""TLU: :math:`y = \max(x, \tau)` with a learned threshold per channel.

    FilterResponseNorm does not centre, so zero is no natural threshold behind it; the paper's layer
    is ``Sequential(ActivationNorm("frn", c), ThresholdedLinearUnit(c))``.

    Args:
        num_features: number of channels.

    Shape: input and output ``(batch, channel, *space)``.

    Raises:
        ValueError: in ``forward``, another number of channels.

    Example:
        >>> import torch
        >>> ThresholdedLinearUnit(1)(torch.tensor([[-2.0], [3.0]])).flatten().tolist()
        [0.0, 3.0]

    Source: Singh & Krishnan, *Filter Response Normalization Layer*, 2020 (arXiv 1911.09737),
    equation 2.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.zeros(positive("num_features", num_features)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger of input and threshold."""
        check_channels("TLU", x, len(self.tau))
        return torch.maximum(x, per_channel(self.tau, x))
