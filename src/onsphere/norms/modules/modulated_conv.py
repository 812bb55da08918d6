"""Modulation and demodulation of StyleGAN2: filters on spheres, one weight per sample."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onsphere.geometry import VectorAxes, normalize
from onsphere.norms.methods import METHODS
from onsphere.norms.modules.channels import positive


class ModulatedConv2d(nn.Module):
    r"""A convolution whose filters are scaled by a style, then projected.

    .. math:: w'_{ijk} = s_i\,w_{ijk}, \qquad
              w''_{ijk} = w'_{ijk} \Big/ \sqrt{\textstyle\sum_{i,k} w'^2_{ijk} + \epsilon}

    for input channel ``i``, filter ``j`` and position ``k``, per sample. The scale of each filter
    changes nothing, and neither does the scale of the style, so no constant of an equalized
    learning rate is needed here.

    Args:
        in_channels: channels of the input, and entries of a style.
        out_channels: number of filters.
        kernel_size: side of the kernel; odd, the output keeps the size of the input.
        demodulate: project; without, as in the layer that makes the image.
        eps: in the root.

    Shape: ``forward`` takes inputs ``(batch, in_channels, height, width)`` and styles
    ``(batch, in_channels)``, and returns ``(batch, out_channels, height, width)``.

    Raises:
        ValueError: an even kernel; in ``forward``, shapes that do not fit.

    Example:
        >>> import torch
        >>> conv, x, s = ModulatedConv2d(3, 4, 3), torch.ones(2, 3, 5, 5), torch.rand(2, 3) + 1
        >>> torch.allclose(conv(x, 5 * s), conv(x, s), atol=1e-5)
        True

    Source: Karras et al., *Analyzing and Improving the Image Quality of StyleGAN*, 2020 (arXiv
    1912.04958), equations 1 and 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        demodulate: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if positive("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        for name, given in (("in_channels", in_channels), ("out_channels", out_channels)):
            positive(name, given)
        self.demodulate, self.eps = demodulate, eps
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Convolve each sample with its own filters."""
        out, inputs, side, _ = self.weight.shape
        if x.ndim != 4 or x.shape[1] != inputs or style.shape != x.shape[:2]:
            raise ValueError(
                f"ModulatedConv2d expects (batch, {inputs}, height, width) and styles "
                f"(batch, {inputs}), got {tuple(x.shape)} and {tuple(style.shape)}"
            )
        weight = self.weight * style[:, None, :, None, None]
        if self.demodulate:
            axes = VectorAxes(index=(0, 1))  # one vector per sample and filter
            vectors = axes.gather(weight)
            map = METHODS["demod"].sphere_map(vectors.shape[-1], self.eps)
            weight = axes.scatter(normalize(vectors, map), weight.shape)
        # One group per sample: the batch becomes channels.
        joined = F.conv2d(
            x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), padding=side // 2, groups=len(x)
        )
        return joined.reshape(len(x), out, *joined.shape[2:])

    def extra_repr(self) -> str:
        """Return the options that were chosen."""
        out, inputs, side, _ = self.weight.shape
        return f"{inputs}, {out}, {side}, demodulate={self.demodulate}"
