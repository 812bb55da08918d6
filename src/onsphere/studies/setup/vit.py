"""A small vision transformer with pre-norm blocks.

Dosovitskiy et al. 2021, *An Image is Worth 16x16 Words* (arXiv 2010.11929), made small: square
patches, at most 8 on a side, learned positions, four blocks
``x + attention(norm(x))``, ``x + mlp(norm(x))``, a last norm, mean over tokens, a linear head.

**Which weights are hidden weights.** Before an activation norm stands no single weight here but the
residual stream, to which patch embedding, positions and the second matrix of every attention and
MLP write. Scaled together they scale the stream, and the norms take the scale away: *they share one
sphere* (``joint``). None of them has a bias. Query, key, value and first MLP matrices read
normalized tokens, so that their scale counts; they are ordinary weights. Weight methods parametrize
every matrix instead, each with spheres of its own.

**Which methods.** LayerNorm and RMSNorm of each token, and the weight methods. BatchNorm,
InstanceNorm and GroupNorm take statistics over an image's space, which tokens do not have.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onsphere.errors import OnsphereError
from onsphere.geometry import VectorAxes
from onsphere.norms import ActivationNorm, parametrize
from onsphere.studies.setup.data import Images
from onsphere.studies.setup.network import GROUPS, LABELS, Network, eps_of, is_length

METHODS = ("none", "ln", "rms", "wn", "cwn", "sn")
"""The methods of the studies that make sense here."""

_DEPTH, _HEADS, _SIDE = 4, 4, 8


class TinyViT(Network):
    """The network.

    Args:
        method_key: one of :data:`METHODS`.
        images: the data set; gives the input's shape, mean and spread, and the classes.
        width: of a token; divisible by 4.
        seed: of the initial weights.
        eps: eps of the method; ``None`` takes its default.

    Raises:
        OnsphereError: a method that makes no sense on tokens.
    """

    def __init__(
        self,
        method_key: str,
        images: Images,
        *,
        width: int = 64,
        seed: int = 0,
        eps: float | None = None,
    ) -> None:
        if method_key not in METHODS:
            raise OnsphereError(
                f"vit-tiny has no place for {LABELS.get(method_key, method_key)}, which takes "
                f"statistics over space: tokens have none. There are: {', '.join(METHODS)}"
            )
        super().__init__(method_key, images)
        self.joint = self.in_activation
        channels, extent = images.train_x.shape[1], images.train_x.shape[2]
        patch = max(2, -(-extent // _SIDE))  # of one pixel, centred, nothing is left
        self.short = -extent % patch
        biased = not self.in_activation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Conv2d(channels, width, patch, patch, bias=biased)
            self.position = nn.Parameter(0.02 * torch.randn(1, (-(-extent // patch)) ** 2, width))
            self.qkv, self.project, self.widen, self.narrow = (
                nn.ModuleList(nn.Linear(a * width, b * width, bias=bias) for _ in range(_DEPTH))
                for a, b, bias in ((1, 3, True), (1, 1, biased), (1, 2, True), (2, 1, biased))
            )
            self.norms = nn.ModuleList(self._norm(width, eps) for _ in range(2 * _DEPTH + 1))
            self.head = nn.Linear(width, images.classes)
            if self.method is not None and not self.in_activation:
                for layer in self._layers():
                    parametrize(layer, self.method, eps=eps)

    def _norm(self, width: int, eps: float | None) -> nn.Module:
        if self.method is None or not self.in_activation:
            return nn.Identity()
        return ActivationNorm(self.method, width, eps=eps_of(self.method, eps), affine=True)

    def _layers(self) -> list[nn.Module]:
        """Return all layers with a matrix but the head."""
        return [self.embed, *self.qkv, *self.project, *self.widen, *self.narrow]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images in [0, 1]."""
        x = F.pad(self.standardized(x), (0, self.short, 0, self.short))
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in range(_DEPTH):
            x = x + self._attention(block, self.norms[2 * block](x))
            y = F.gelu(self.widen[block](self.norms[2 * block + 1](x)))
            x = x + self.narrow[block](y)
        return self.head(self.norms[-1](x).mean(1))

    def _attention(self, block: int, x: Tensor) -> Tensor:
        # (batch, tokens, 3 * heads * size) -> three of (batch, heads, tokens, size)
        q, k, v = self.qkv[block](x).unflatten(2, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.project[block](y.transpose(1, 2).flatten(2))
        return out

    def hidden_weights(self) -> dict[str, tuple[nn.Parameter, VectorAxes]]:
        """Return what writes to the residual stream; of weight methods, every direction.

        The former are each one vector, parts of the one sphere that they share; without a method
        they are given too, although they live on no sphere.
        """
        if self.method is not None and not self.in_activation:
            axes = self.method.weight_axes(GROUPS)
            return {
                name: (parameter, axes)
                for name, parameter in self.named_parameters()
                if ".parametrizations." in name and not is_length(name)
            }
        named = dict(self.named_parameters())
        writers = [n for n in named if n.split(".")[0] in ("embed", "project", "narrow")]
        weights = ["position", *(name for name in writers if named[name].ndim > 1)]
        return {name: (named[name], VectorAxes()) for name in weights}

    def other_weights(self) -> list[nn.Parameter]:
        """Return the matrices that read the stream; of weight methods, the positions."""
        if self.method is not None and not self.in_activation:
            return [self.position]
        return [layer.weight for layer in (*self.qkv, *self.widen)]
