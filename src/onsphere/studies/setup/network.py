"""The small convolutional network of the studies, with any method in place.

Three 3x3 convolutions, each followed by the method and a ReLU, then a linear head:
``conv -> norm -> relu`` three times, flatten, linear. Weight methods parametrize the convolutions
instead. Convolutions before an activation norm have no bias, so that the weight alone is what
lives on a sphere.
"""

import math

import torch
from torch import Tensor, nn

from onsphere.geometry import VectorAxes
from onsphere.norms import METHODS, ActivationNorm, Method, method, parametrize
from onsphere.studies.setup.data import Images

STUDIED = ("none", "bn", "ln", "in", "gn", "rms", "wn", "cwn", "sn")
"""The methods of the study, in the order of its tables."""

LABELS = {
    "none": "none",
    "bn": "BN",
    "ln": "LN",
    "in": "IN",
    "gn": "GN",
    "rms": "RMS",
    "wn": "WN",
    "cwn": "CWN",
    "sn": "SN",
}
"""How tables and figures call them."""

GROUPS = 4  # channel groups of GroupNorm


class SmallConvNet(nn.Module):
    """The network.

    Args:
        method_key: a name of :data:`STUDIED`.
        images: the data set; gives the input's shape, mean and spread, and the classes.
        width: channels of the first convolution; the others have twice as many.
        seed: of the initial weights.
        eps: eps of the method; ``None`` takes its default.

    Attributes:
        convs: the three convolutions.
        norms: what stands behind each of them.
        head: the linear classifier.
    """

    def __init__(
        self,
        method_key: str,
        images: Images,
        *,
        width: int = 8,
        seed: int = 0,
        eps: float | None = None,
    ) -> None:
        super().__init__()
        self.method: Method | None = None if method_key == "none" else method(method_key)
        channels, extent = images.train_x.shape[1], images.train_x.shape[2]
        widths = (width, 2 * width, 2 * width)
        strides = (1 if extent < 16 else 2, 2, 2)
        in_activation = self.method is not None and self.method.normalizes == "activation"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            convs, norms = [], []
            for out, stride in zip(widths, strides, strict=True):
                convs.append(nn.Conv2d(channels, out, 3, stride, 1, bias=not in_activation))
                channels, extent = out, math.ceil(extent / stride)
                norms.append(_norm(self.method, convs[-1], extent, eps))
            self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)
            self.head = nn.Linear(channels * extent * extent, images.classes)
        self.register_buffer("input_mean", images.train_x.mean())
        self.register_buffer("input_spread", images.train_x.std())

    input_mean: Tensor
    input_spread: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images in [0, 1]."""
        x = (x - self.input_mean) / self.input_spread
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.head(x.flatten(1))

    @property
    def has_eps(self) -> bool:
        """Whether an activation norm with an eps stands in the network."""
        return self.method is not None and self.method.normalizes == "activation"

    def hidden_weights(self) -> dict[str, tuple[nn.Parameter, VectorAxes]]:
        """Return each convolution's free weight and which parts of it live on a sphere each.

        For a weight method this is the direction (or the raw matrix), not the projected weight.
        Without a method the whole weight is given, although it lives on no sphere.
        """
        names = {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("convs.") and parameter.ndim == 4 and not _is_length(name)
        }
        axes = self.method.weight_axes(GROUPS) if self.method else VectorAxes()
        return {name: (parameter, axes) for name, parameter in names.items()}

    @torch.no_grad()
    def rescale_hidden_(self, factor: float | Tensor) -> "SmallConvNet":
        """Multiply the hidden weights and, to keep the function, BatchNorm's running statistics.

        This is the gauge transformation of a normalized network: it moves the norms of the
        weights and, up to eps, nothing else. One factor for all weights, and no audit: for other
        models :func:`onsphere.symmetry.rescaled` draws one for every symmetry that an audit finds.
        """
        for parameter, _ in self.hidden_weights().values():
            parameter.mul_(factor)
        for norm in self.norms:
            if isinstance(norm, ActivationNorm) and norm.running_mean is not None:
                assert norm.running_var is not None
                norm.running_mean.mul_(factor)
                norm.running_var.mul_(factor * factor)
        return self


def _norm(row: Method | None, conv: nn.Conv2d, extent: int, eps: float | None) -> nn.Module:
    """Put the method behind (or into) a convolution."""
    if row is None:
        return nn.Identity()
    if row.normalizes == "weight":
        parametrize(conv, row, eps=eps)
        return nn.Identity()
    if eps is None:  # the eps of the dtype that networks are trained in, whatever they are cast to
        eps = torch.finfo(torch.float32).eps if row.eps is None else row.eps
    channels = conv.out_channels
    size = channels if row.affine == "channel" else (channels, extent, extent)
    return ActivationNorm(
        row, size, num_groups=GROUPS if row.grouped else None, eps=eps, affine=True
    )


def _is_length(name: str) -> bool:
    """``original0`` of a weight method is the length, ``original1`` the direction."""
    return name.endswith("original0")


assert set(STUDIED) - {"none"} <= set(METHODS)
