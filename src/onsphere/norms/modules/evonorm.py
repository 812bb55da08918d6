"""EvoNorm-S0: a gate and a GroupNorm without its centring, found by search."""

import torch
from torch import Tensor, nn

from onsphere.geometry import VectorAxes
from onsphere.norms.modules.channels import check_channels, per_channel, positive


class EvoNormS0(nn.Module):
    r"""EvoNorm-S0, a normalization and an activation at once.

    .. math:: y = \gamma\,\frac{x\,\mathrm{sigmoid}(v\,x)}{\sqrt{\sigma_g^2+\epsilon}} + \beta

    :math:`\sigma_g^2` is the variance of GroupNorm: per sample and group, over channels and space.
    It replaces a normalization and the activation after it. The gate sees the scale of ``x``, so no
    weight before it lives on a sphere; weight and bias of a group trade their scale with its ``v``.

    Args:
        num_features: number of channels.
        groups: number of groups; they divide the channels.
        eps: added to the variance.

    Shape: input and output ``(batch, channel, *space)``.

    Raises:
        ValueError: groups that do not divide the channels; in ``forward``, another number of
            channels.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[-1.0, 1.0]]])
        >>> EvoNormS0(1, groups=1, eps=0.0)(x)[0, 0]              # SiLU, over a deviation of 1
        tensor([-0.2689,  0.7311], grad_fn=<SelectBackward0>)

    Source: Liu et al., *Evolving Normalization-Activation Layers*, 2020 (arXiv 2004.02967),
    table 2.
    """

    def __init__(self, num_features: int, *, groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__()
        if groups < 1 or positive("num_features", num_features) % groups:
            raise ValueError(
                f"EvoNorm-S0 needs groups that divide {num_features} channels, got groups={groups}"
            )
        self.num_features, self.groups, self.eps = num_features, groups, eps
        ones = torch.ones(num_features)
        self.v, self.weight = nn.Parameter(ones.clone()), nn.Parameter(ones.clone())
        self.bias = nn.Parameter(0 * ones)

    def forward(self, x: Tensor) -> Tensor:
        """Gate, and divide by the deviation of each group."""
        check_channels("EvoNorm-S0", x, self.num_features)
        groups, inside = VectorAxes(index=(0,), pieces=((1, self.groups),)).split(x)
        var = groups.var(inside, correction=0, keepdim=True).expand_as(groups).reshape(x.shape)
        y = x * (per_channel(self.v, x) * x).sigmoid() * (var + self.eps).rsqrt()
        return y * per_channel(self.weight, x) + per_channel(self.bias, x)

    def extra_repr(self) -> str:
        """Return the options that were chosen."""
        return f"{self.num_features}, groups={self.groups}, eps={self.eps}"
