"""ResNet-20 for small images, with any method of the studies in BatchNorm's place.

He et al. 2015, *Deep Residual Learning for Image Recognition* (arXiv 1512.03385), section 4.2: a
3x3 convolution, then three stages of three blocks of two 3x3 convolutions with 16, 32 and 64
channels, mean over space, a linear head. Shortcuts between stages take every second pixel and fill
the new channels with zeros (option A), so that every weight but the head's stands before a
normalization. Weight methods parametrize all convolutions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onsphere.studies.setup.data import Images
from onsphere.studies.setup.network import Network, norm_behind

_BLOCKS = 3  # per stage


class ResNet20(Network):
    """The network.

    Args:
        method_key: a name of :data:`~onsphere.studies.setup.network.STUDIED`.
        images: the data set; gives the input's shape, mean and spread, and the classes.
        width: channels of the first stage.
        seed: of the initial weights.
        eps: eps of the method; ``None`` takes its default.
    """

    def __init__(
        self,
        method_key: str,
        images: Images,
        *,
        width: int = 16,
        seed: int = 0,
        eps: float | None = None,
    ) -> None:
        super().__init__(method_key, images)
        channels, extent = images.train_x.shape[1], images.train_x.shape[2]
        stages = [(width << stage, 2 if stage else 1) for stage in range(3)]
        # Channels and stride of every convolution: the first, then two per block.
        plan = [(width, 1)]
        for out, stride in stages:
            plan += [(out, stride), (out, 1)] + [(out, 1)] * 2 * (_BLOCKS - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            convs, norms = [], []
            for out, stride in plan:
                convs.append(nn.Conv2d(channels, out, 3, stride, 1, bias=not self.in_activation))
                channels, extent = out, math.ceil(extent / stride)
                norms.append(norm_behind(self.method, convs[-1], extent, eps))
            self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)
            self.head = nn.Linear(channels, images.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images in [0, 1]."""
        x = torch.relu(self._layer(0, self.standardized(x)))
        for first in range(1, len(self.convs), 2):
            y = torch.relu(self._layer(first, x))
            y = self._layer(first + 1, y)
            x = torch.relu(y + _shortcut(x, y))
        return self.head(x.mean((2, 3)))

    def _layer(self, number: int, x: Tensor) -> Tensor:
        y: Tensor = self.norms[number](self.convs[number](x))
        return y


def _shortcut(x: Tensor, like: Tensor) -> Tensor:
    """Return the block's input in the shape of its output, without a parameter."""
    if x.shape == like.shape:
        return x
    new = like.shape[1] - x.shape[1]
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new - new // 2))
