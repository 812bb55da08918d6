"""Batch renormalization: BatchNorm that trains on what it will evaluate."""

import torch
from torch import Tensor, nn

from onsphere.norms.batch_statistics import follow
from onsphere.norms.modules.channels import check_channels, per_channel, positive


class BatchRenorm(nn.Module):
    r"""Batch renormalization.

    .. math:: y = \gamma\left(\frac{x-\mu_B}{\sigma_B}\,r + d\right) + \beta

    :math:`r = \mathrm{clip}(\sigma_B/\sigma,\,1/r_{max},\,r_{max})` and
    :math:`d = \mathrm{clip}((\mu_B-\mu)/\sigma,\,-d_{max},\,d_{max})`, with running
    :math:`\mu, \sigma`; both are constants to the gradient. Within their limits
    :math:`y = \gamma (x-\mu)/\sigma + \beta`, which is also what eval mode computes.

    A filter before it has no sphere, for its scale counts against the running statistics; its
    gradient is orthogonal to it all the same, so its norm grows as on a sphere. At
    ``r_max = 1, d_max = 0`` it is BatchNorm.

    Args:
        num_features: number of channels.
        eps: added to the variance of the batch, :math:`\sigma_B = \sqrt{var + \epsilon}`.
        momentum: weight of the newest batch in the running statistics.
        r_max: limit of ``r``, at least 1. The paper raises it from 1 to 3 and ``d_max`` from 0 to 5
            after some thousand steps; both are attributes that a training may set.
        d_max: limit of ``d``, at least 0.
        affine: learn gain and shift.

    Shape: input and output ``(batch, channel, *space)``.

    Raises:
        ValueError: a limit out of range; in ``forward``, another number of channels, or one value
            per channel in training mode.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> norm = BatchRenorm(3, r_max=100.0, d_max=100.0)
        >>> torch.allclose(norm(x), x, atol=1e-4)     # running mean 0, deviation 1: nothing to do
        True

    Source: Ioffe, *Batch Renormalization*, 2017 (arXiv 1702.03275), algorithm 1.
    """

    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.01,
        r_max: float = 3.0,
        d_max: float = 5.0,
        affine: bool = True,
    ) -> None:
        super().__init__()
        if not (r_max >= 1 and d_max >= 0):
            raise ValueError(
                f"r_max is at least 1 and d_max at least 0, got r_max={r_max}, d_max={d_max}"
            )
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.r_max, self.d_max = r_max, d_max
        ones = torch.ones(positive("num_features", num_features))
        self.weight = nn.Parameter(ones.clone()) if affine else None
        self.bias = nn.Parameter(0 * ones) if affine else None
        self.register_buffer("running_mean", 0 * ones)
        self.register_buffer("running_std", ones.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the batch, corrected towards the running statistics."""
        check_channels("batch renormalization", x, self.num_features)
        if self.training:
            y = self._renormalized(x)
        else:
            y = (x - per_channel(self.running_mean, x)) / per_channel(self.running_std, x)
        if self.weight is None or self.bias is None:
            return y
        return y * per_channel(self.weight, x) + per_channel(self.bias, x)

    def _renormalized(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        if x.numel() <= x.shape[1]:
            raise ValueError(
                f"expected more than 1 value per channel when training, got input size "
                f"{tuple(x.shape)}"
            )
        mean = x.mean(axes)
        std = (x.var(axes, correction=0) + self.eps).sqrt()
        ratio = (std / self.running_std).detach().clamp(1 / self.r_max, self.r_max)
        shift = ((mean - self.running_mean) / self.running_std).detach()
        shift = shift.clamp(-self.d_max, self.d_max)
        y = (x - per_channel(mean, x)) * per_channel(ratio / std, x) + per_channel(shift, x)
        follow(self.running_mean, mean, self.momentum)
        follow(self.running_std, std, self.momentum)
        return y

    def extra_repr(self) -> str:
        """Return the options that were chosen."""
        return f"{self.num_features}, eps={self.eps}, r_max={self.r_max}, d_max={self.d_max}"
