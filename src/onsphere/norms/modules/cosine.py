"""Cosine normalization: the cosine of weight and input in place of their product."""

import torch
from torch import Tensor, nn

from onsphere.geometry import SphereMap, normalize
from onsphere.norms.modules.channels import positive


class CosineLinear(nn.Module):
    r"""A linear layer of cosines: :math:`y_i = s\,\frac{\langle w_i, x\rangle}{|w_i|\,|x|} + b_i`.

    Row and input are both projected, so the scale of neither counts, of each row by itself.

    Args:
        in_features: entries of an input.
        out_features: number of rows.
        bias: learn a shift; the paper has none.
        scale: the factor :math:`s`: 1 in the paper, more where a softmax follows.
        centered: centre rows and inputs first, the Pearson correlation.
        eps: the least length that divides.

    Shape: ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        ValueError: a size below 1; in ``forward``, another size of inputs.

    Example:
        >>> import torch
        >>> layer = CosineLinear(4, 3)
        >>> bool(layer(1e6 * torch.ones(2, 4)).abs().max() <= 1 + 1e-6)
        True

    Source: Luo et al., *Cosine Normalization*, 2018 (arXiv 1702.05870), equations 5 and 9.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        scale: float = 1.0,
        centered: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        shape = positive("out_features", out_features), positive("in_features", in_features)
        self.scale, self.map = scale, SphereMap(centered, eps=eps, eps_place="clamp")
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the cosines with every row."""
        if not x.ndim or x.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"CosineLinear expects (..., {self.weight.shape[1]}), got shape {tuple(x.shape)}"
            )
        rows = self.scale * normalize(self.weight, self.map)
        return nn.functional.linear(normalize(x, self.map), rows, self.bias)

    def extra_repr(self) -> str:
        """Return the options that were chosen."""
        out, inputs = self.weight.shape
        return f"{inputs}, {out}, scale={self.scale}, centered={self.map.centered}"
