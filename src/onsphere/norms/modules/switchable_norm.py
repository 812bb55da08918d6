"""Switchable normalization: InstanceNorm, LayerNorm and BatchNorm in learned shares."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onsphere.norms.batch_statistics import follow
from onsphere.norms.modules.channels import check_channels, per_channel, positive


class SwitchableNorm(nn.Module):
    r"""Switchable normalization.

    .. math::

        y = \gamma\,\frac{x - \sum_k w_k\,\mu_k}{\sqrt{\sum_k w'_k\,\sigma_k^2+\epsilon}} + \beta

    ``k`` runs over InstanceNorm (per sample and channel, over space), LayerNorm (per sample, over
    channels and space) and BatchNorm (per channel, over batch and space); the shares
    :math:`w, w'` are softmaxes of three learned numbers each. Scaling weight and bias of the whole
    layer scales every statistic alike and changes nothing.

    Args:
        num_features: number of channels.
        eps: added to the mixed variance.
        momentum: weight of the newest batch in the running statistics of the BatchNorm part.

    Shape: input and output ``(batch, channel, *space)`` with at least one axis of space.

    Raises:
        ValueError: in ``forward``, another number of channels, or no space.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(SwitchableNorm(3)(8 * x), SwitchableNorm(3)(x), atol=1e-4)
        True

    Source: Luo et al., *Differentiable Learning-to-Normalize via Switchable Normalization*, 2019
    (arXiv 1806.10779), equations 2 to 5.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        ones = torch.ones(positive("num_features", num_features))
        self.weight, self.bias = nn.Parameter(ones.clone()), nn.Parameter(0 * ones)
        # In the order instance, layer, batch; equal numbers are equal shares.
        self.mean_weight, self.var_weight = (nn.Parameter(torch.ones(3)) for _ in range(2))
        self.register_buffer("running_mean", 0 * ones)
        self.register_buffer("running_var", ones.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by mixed statistics."""
        check_channels("switchable normalization", x, self.num_features)
        if x.ndim < 3:
            raise ValueError(
                f"switchable normalization needs space, over which InstanceNorm runs: got shape "
                f"{tuple(x.shape)}"
            )
        space = list(range(2, x.ndim))
        if self.training:
            of_batch = _var_mean(x, [0, *space])
            follow(self.running_var, of_batch[0], self.momentum)
            follow(self.running_mean, of_batch[1], self.momentum)
        else:
            of_batch = per_channel(self.running_var, x), per_channel(self.running_mean, x)
        parts = _var_mean(x, space), _var_mean(x, [1, *space]), of_batch
        variances, means = zip(*parts, strict=True)
        y = x - _mixed(self.mean_weight, means)
        y = y * (_mixed(self.var_weight, variances) + self.eps).rsqrt()
        return y * per_channel(self.weight, x) + per_channel(self.bias, x)

    def extra_repr(self) -> str:
        """Return the options that were chosen."""
        return f"{self.num_features}, eps={self.eps}"


def _var_mean(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    return torch.var_mean(x, axes, correction=0, keepdim=True)


def _mixed(weights: Tensor, statistics: Sequence[Tensor]) -> Tensor:
    first, second, third = weights.softmax(0)
    return first * statistics[0] + second * statistics[1] + third * statistics[2]
