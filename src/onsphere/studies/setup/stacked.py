"""Several small networks of one shape as one: batched matrix products, the batch innermost.

Every parameter and buffer of a :class:`~onsphere.studies.setup.network.SmallConvNet` gets an axis
in front, the *members*. Activations have the shape ``(members, channels, height, width, batch)``.
With the images of a batch side by side in memory, what a filter reads is copied and summed in long
runs, where images of eight by eight pixels have none, and a convolution is one product of matrices
per member. Nothing is shared between members: what one computes does not depend on who stands
beside it, also where it is not finite.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onsphere.norms import ActivationNorm, Method, SpectralSphere
from onsphere.norms.weight import WeightSphere
from onsphere.studies.setup.network import GROUPS, Network

_PARAMETRIZED = "parametrizations.weight"
_KERNEL = 3  # height and width of all filters, which are padded by one


class StackedNetworks:
    """Networks of one method and shape, computed together.

    Args:
        members: small networks, at least one; their parameters and buffers are copied.

    Attributes:
        parameters: by the name that they have in one network, each of shape ``(members, *shape)``.
        buffers: likewise.
        training: whether BatchNorm takes its statistics from the batch, and power iterations go on.
    """

    def __init__(self, members: Sequence[Network]) -> None:
        self.like = members[0]
        self.training = True
        parameters = [dict(member.named_parameters()) for member in members]
        buffers = [dict(member.named_buffers()) for member in members]
        self.parameters = {
            name: torch.stack([own[name].detach() for own in parameters]).requires_grad_()
            for name in parameters[0]
        }
        self.buffers = {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]}

    def __len__(self) -> int:
        return len(self.parameters["head.bias"])

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits, shape ``(members, batch, classes)``.

        Args:
            x: images in [0, 1], shape ``(members, batch, channels, height, width)``; or
                ``(batch, channels, height, width)``, the same images for every member.
        """
        x = (x - self.like.input_mean) / self.like.input_spread
        x = x.expand(len(self), *x.shape[-4:]).permute(0, 2, 3, 4, 1)
        for layer, conv in enumerate(self.like.convs):
            assert isinstance(conv, nn.Conv2d)
            bias = self.parameters.get(f"convs.{layer}.bias")
            x = _Convolution.apply(x, self._weight(layer), conv.stride[0])  # type: ignore[no-untyped-call]
            x = torch.relu(self._normalized(layer, x if bias is None else x + _beside(bias)))
        features = x.flatten(1, 3).transpose(1, 2)
        weight, bias = self.parameters["head.weight"], self.parameters["head.bias"]
        return torch.baddbmm(bias[:, None], features, weight.transpose(1, 2))

    def keep(self, members: Tensor) -> None:
        """Go on with some of the members, given by their numbers."""
        self.parameters = {
            name: value.detach()[members].requires_grad_(value.requires_grad)
            for name, value in self.parameters.items()
        }
        self.buffers = {name: value[members] for name, value in self.buffers.items()}

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Return a copy of one member's parameters and buffers, for a single network to load."""
        held = {**self.parameters, **self.buffers}
        return {name: held[name][member].detach().clone() for name in self.like.state_dict()}

    def _weight(self, layer: int) -> Tensor:
        """Return the weight that a layer convolves with, of shape ``(members, *shape)``."""
        conv, prefix = self.like.convs[layer], f"convs.{layer}"
        if self.like.method is None or self.like.method.normalizes == "activation":
            return self.parameters[f"{prefix}.weight"]
        (projection,) = conv.parametrizations.weight  # type: ignore[union-attr,misc]
        held = [
            value
            for name, value in self.parameters.items()
            if name.startswith(f"{prefix}.{_PARAMETRIZED}.original")
        ]
        if isinstance(projection, SpectralSphere):
            return self._spectral(f"{prefix}.{_PARAMETRIZED}.0", *held, eps=projection.eps)
        assert isinstance(projection, WeightSphere)
        filters: Tensor = projection(*(value.flatten(0, 1) for value in held))  # one row each
        return filters.view(len(self), -1, *filters.shape[1:])

    def _spectral(self, prefix: str, weight: Tensor, *, eps: float) -> Tensor:
        """Divide each member's matrix by its estimated largest singular value."""
        matrix, u, v = weight.flatten(2), self.buffers[f"{prefix}._u"], self.buffers[f"{prefix}._v"]
        if self.training:
            with torch.no_grad():
                u = F.normalize(_times(matrix, v), dim=1, eps=eps)
                v = F.normalize(_times(matrix.transpose(1, 2), u), dim=1, eps=eps)
            self.buffers |= {f"{prefix}._u": u, f"{prefix}._v": v}
        sigma = (u * _times(matrix, v)).sum(1)
        return weight / sigma[:, None, None, None, None]

    def _normalized(self, layer: int, x: Tensor) -> Tensor:
        """Do what stands behind a convolution, with its gain and shift."""
        norm, row = self.like.norms[layer], self.like.method
        if not isinstance(norm, ActivationNorm):
            return x
        assert row is not None
        gain = self.parameters[f"norms.{layer}.weight"]
        shift = self.parameters.get(f"norms.{layer}.bias")
        if row.statistics == "batch":
            return self._batch_norm(layer, x, gain, shift)
        groups = len(self) * _groups(row, norm.size[0])
        y: Tensor = _GroupNormalized.apply(x, groups, norm.eps_for(x), row.centered)  # type: ignore[no-untyped-call]
        return (
            y * _beside(gain) if shift is None else torch.addcmul(_beside(shift), y, _beside(gain))
        )

    def _batch_norm(self, layer: int, x: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        norm, prefix = self.like.norms[layer], f"norms.{layer}"
        assert isinstance(norm, ActivationNorm)
        mean, var = (self.buffers[f"{prefix}.running_{what}"].view(-1) for what in ("mean", "var"))
        if self.training:
            self.buffers[f"{prefix}.num_batches_tracked"] += 1
        bias = None if shift is None else shift.flatten()
        assert norm.momentum is not None
        channels, eps = x.reshape(1, gain.numel(), -1), norm.eps_for(x)
        return F.batch_norm(
            channels, mean, var, gain.flatten(), bias, self.training, norm.momentum, eps
        ).view(x.shape)


def _groups(row: Method, channels: int) -> int:
    """How many groups of one member's channels are normalized on their own."""
    if "channel" not in row.inside:
        return channels
    return GROUPS if row.grouped else 1


class _Convolution(torch.autograd.Function):
    """Convolve each member's images with its own filters.

    What the filters read at every place is copied out, ``(members, channels * 9, places * batch)``,
    and multiplied by the filters, one row each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        read = _read_by(padded, stride)
        columns = read.reshape(len(x), -1, read[0, 0, 0, 0].numel())
        ctx.save_for_backward(columns, weight)
        ctx.stride, ctx.padded, ctx.places = stride, padded.shape, read.shape[4:]
        return torch.bmm(weight.flatten(2), columns).view(*weight.shape[:2], *ctx.places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        columns, weight = ctx.saved_tensors
        gradient = gradients[0].flatten(2)
        of_weight = torch.bmm(gradient, columns.transpose(1, 2)).view(weight.shape)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        of_columns = torch.bmm(weight.flatten(2).transpose(1, 2), gradient)
        of_read = of_columns.view(*ctx.padded[:2], _KERNEL, _KERNEL, *ctx.places)
        of_padded = gradient.new_zeros(ctx.padded)
        places = _read_by(of_padded, ctx.stride)
        for row in range(_KERNEL):
            for column in range(_KERNEL):
                places[:, :, row, column] += of_read[:, :, row, column]
        return of_padded[:, :, 1:-1, 1:-1], of_weight, None


def _read_by(padded: Tensor, stride: int) -> Tensor:
    """Return a view of what filters read: ``(members, channels, 3, 3, height, width, batch)``."""
    members, channels, rows, columns, batch = padded.stride()
    height, width = ((extent - _KERNEL) // stride + 1 for extent in padded.shape[2:4])
    return padded.as_strided(
        (*padded.shape[:2], _KERNEL, _KERNEL, height, width, padded.shape[4]),
        (members, channels, rows, columns, stride * rows, stride * columns, batch),
    )


class _GroupNormalized(torch.autograd.Function):
    r"""Normalize each image's channels in groups, over space; centred or not.

    With :math:`P` the mean over a group, :math:`y = r (x - P x)`, :math:`r = (P (x - P x)^2 +
    \epsilon)^{-1/2}`, and the gradient is :math:`r (g - y P(g y) - P g)`. Where squares overflow
    both are 0; the gradient of PyTorch's layer and group norm is no number there, so that a run
    ends which here goes on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, eps: float, centered: bool) -> Tensor:
        v = x.reshape(groups, -1, x.shape[-1])
        if centered:
            v = v - v.mean(1, keepdim=True)
        scale = ((v * v).mean(1, keepdim=True) + eps).rsqrt()
        y = v * scale
        ctx.save_for_backward(y, scale)
        ctx.centered = centered
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        y, scale = ctx.saved_tensors
        g = gradients[0].reshape(y.shape)
        slope = torch.addcmul(g, y, (g * y).mean(1, keepdim=True), value=-1)
        if ctx.centered:
            slope -= g.mean(1, keepdim=True)
        slope *= scale
        return slope.view(gradients[0].shape), None, None, None


def _beside(learned: Tensor) -> Tensor:
    """Lay what is learned per channel, or per channel and place, out beside activations."""
    return learned.view(*learned.shape, *[1] * (5 - learned.ndim))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Multiply a matrix and a vector per member."""
    return torch.bmm(matrix, vector[:, :, None])[:, :, 0]
