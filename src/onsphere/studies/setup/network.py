"""The networks of the studies, with any method in place: what they share, and the small one.

The small network has three 3x3 convolutions, each followed by the method and a ReLU, then a linear
head: ``conv -> norm -> relu`` three times, flatten, linear. Weight methods parametrize the
convolutions instead. Convolutions before an activation norm have no bias, so that the weight alone
is what lives on a sphere. Larger networks: :mod:`~onsphere.studies.setup.resnet`,
:mod:`~onsphere.studies.setup.vit`.
"""

import math
from typing import Self

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


class Network(nn.Module):
    """What every network of the studies is made of.

    Args:
        method_key: a name of :data:`STUDIED`.
        images: the data set; gives the input's shape, mean and spread, and the classes.

    Attributes:
        method: the row of the method; ``None`` without one.
        convs: the layers whose weights are hidden weights, where each is followed by its norm.
        norms: what stands behind each of them.
        head: the linear classifier.
        joint: whether the hidden weights share one sphere instead of having one or more each.
    """

    convs: nn.ModuleList
    norms: nn.ModuleList
    head: nn.Linear
    joint = False
    input_mean: Tensor
    input_spread: Tensor

    def __init__(self, method_key: str, images: Images) -> None:
        super().__init__()
        self.method: Method | None = None if method_key == "none" else method(method_key)
        self.register_buffer("input_mean", images.train_x.mean())
        self.register_buffer("input_spread", images.train_x.std())

    @property
    def in_activation(self) -> bool:
        """Whether the method normalizes activations."""
        return self.method is not None and self.method.normalizes == "activation"

    @property
    def has_eps(self) -> bool:
        """Whether an activation norm with an eps stands in the network."""
        return self.in_activation

    def standardized(self, x: Tensor) -> Tensor:
        """Return images of mean 0 and spread 1, from images in [0, 1]."""
        return (x - self.input_mean) / self.input_spread

    def hidden_weights(self) -> dict[str, tuple[nn.Parameter, VectorAxes]]:
        """Return each convolution's free weight and which parts of it live on a sphere each.

        For a weight method this is the direction (or the raw matrix), not the projected weight.
        Without a method the whole weight is given, although it lives on no sphere.
        """
        names = {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("convs.") and parameter.ndim == 4 and not is_length(name)
        }
        axes = self.method.weight_axes(GROUPS) if self.method else VectorAxes()
        return {name: (parameter, axes) for name, parameter in names.items()}

    def other_weights(self) -> list[nn.Parameter]:
        """Return weights beside the hidden ones and the head's that decay like them."""
        return []

    @torch.no_grad()
    def rescale_hidden_(self, factor: float | Tensor) -> Self:
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


class SmallConvNet(Network):
    """The small network.

    Args:
        method_key: a name of :data:`STUDIED`.
        images: the data set; gives the input's shape, mean and spread, and the classes.
        width: channels of the first convolution; the others have twice as many.
        depth: convolutions of each width; only the first of them has a stride.
        seed: of the initial weights.
        eps: eps of the method; ``None`` takes its default.
    """

    def __init__(
        self,
        method_key: str,
        images: Images,
        *,
        width: int = 8,
        depth: int = 1,
        seed: int = 0,
        eps: float | None = None,
    ) -> None:
        super().__init__(method_key, images)
        channels, extent = images.train_x.shape[1], images.train_x.shape[2]
        widths = (width, 2 * width, 2 * width)
        strides = (1 if extent < 16 else 2, 2, 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            convs, norms = [], []
            for out, first in zip(widths, strides, strict=True):
                for stride in (first, *[1] * (depth - 1)):
                    bias = not self.in_activation
                    convs.append(nn.Conv2d(channels, out, 3, stride, 1, bias=bias))
                    channels, extent = out, math.ceil(extent / stride)
                    norms.append(norm_behind(self.method, convs[-1], extent, eps))
            self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)
            self.head = nn.Linear(channels * extent * extent, images.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images in [0, 1]."""
        x = self.standardized(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.head(x.flatten(1))


def norm_behind(row: Method | None, conv: nn.Conv2d, extent: int, eps: float | None) -> nn.Module:
    """Put the method behind (or into) a convolution.

    Args:
        row: the method; ``None`` for none.
        conv: the convolution; weight methods parametrize it.
        extent: height and width of its output.
        eps: of the method; ``None`` takes its default.

    Returns:
        What stands behind the convolution.
    """
    if row is None:
        return nn.Identity()
    if row.normalizes == "weight":
        parametrize(conv, row, eps=eps)
        return nn.Identity()
    channels = conv.out_channels
    size = channels if row.affine == "channel" else (channels, extent, extent)
    return ActivationNorm(
        row,
        size,
        num_groups=GROUPS if row.grouped else None,
        eps=eps_of(row, eps),
        affine=True,
    )


def eps_of(row: Method, eps: float | None) -> float:
    """Return the eps that was given, or the method's.

    Where that is the machine epsilon, it is that of float32, in which networks are trained,
    whatever they are cast to.
    """
    if eps is not None:
        return eps
    return torch.finfo(torch.float32).eps if row.eps is None else row.eps


def is_length(name: str) -> bool:
    """Tell the length of a weight method, ``original0``, from the direction, ``original1``."""
    return name.endswith("original0")


assert set(STUDIED) - {"none"} <= set(METHODS)
