"""RobustNorm: centred, then divided by a small power of the range."""

import torch
from torch import Tensor, nn

from onsphere.norms.batch_statistics import follow
from onsphere.norms.modules.channels import check_channels, per_channel, positive


class RobustNorm(nn.Module):
    r"""RobustNorm: :math:`y = \gamma\,\frac{x - \mu}{(\max x - \min x)^p + \epsilon} + \beta`.

    Statistics are those of BatchNorm: per channel, over batch and space, and running ones in eval
    mode. Because :math:`p < 1` the output still grows with the weight before it, with degree
    :math:`1 - p`: no weight lives on a sphere. Only the bias before it does nothing.

    Args:
        num_features: number of channels.
        power: :math:`p`, above 0; 1 would be a projection.
        eps: added to the denominator.
        momentum: weight of the newest batch in the running mean and range.
        affine: learn gain and shift.

    Shape: input and output ``(batch, channel, *space)``.

    Raises:
        ValueError: a power that is not positive; in ``forward``, another number of channels.

    Example:
        >>> import torch
        >>> x = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> norm = RobustNorm(1, power=0.5, eps=0.0, affine=False)
        >>> norm(16 * x).flatten() / norm(x).flatten()[0]         # 16 times the input: 4 times
        tensor([ 4., -0., -4.])

    Source: Awais et al., *Towards an Adversarially Robust Normalization Approach*, 2020
    (arXiv 2006.11007).
    """

    running_mean: Tensor
    running_range: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        power: float = 0.2,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        if not power > 0:
            raise ValueError(f"power must be positive, got {power}")
        self.num_features, self.power, self.eps, self.momentum = num_features, power, eps, momentum
        ones = torch.ones(positive("num_features", num_features))
        self.weight = nn.Parameter(ones.clone()) if affine else None
        self.bias = nn.Parameter(0 * ones) if affine else None
        self.register_buffer("running_mean", 0 * ones)
        self.register_buffer("running_range", ones.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Centre, and divide by a power of the range."""
        check_channels("RobustNorm", x, self.num_features)
        if self.training:
            axes = [0, *range(2, x.ndim)]
            mean, extent = x.mean(axes), x.amax(axes) - x.amin(axes)
            follow(self.running_mean, mean, self.momentum)
            follow(self.running_range, extent, self.momentum)
        else:
            mean, extent = self.running_mean, self.running_range
        y = (x - per_channel(mean, x)) / (per_channel(extent**self.power, x) + self.eps)
        if self.weight is None or self.bias is None:
            return y
        return y * per_channel(self.weight, x) + per_channel(self.bias, x)

    def extra_repr(self) -> str:
        """Return the options that were chosen."""
        return f"{self.num_features}, power={self.power}, eps={self.eps}"
