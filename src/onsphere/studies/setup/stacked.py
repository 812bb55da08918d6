"""Several small networks of one shape as one: grouped convolutions in channels-last memory.

Every parameter and buffer of a :class:`~onsphere.studies.setup.network.SmallConvNet` gets an axis
in front, the *members*. Activations hold the members' channels one behind the other, shape
``(batch, members * channels, height, width)``, so that a convolution with one group per member and
a normalization with as many times more channels (or groups) do for all members what they do for
one. Nothing is shared between members: what one computes does not depend on who stands beside it,
also where it is not finite.
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
            x: images in [0, 1], shape ``(batch, members * channels, height, width)``; or
                ``(batch, channels, height, width)``, the same images for every member.
        """
        x = (x - self.like.input_mean) / self.like.input_spread
        x = x.contiguous(memory_format=torch.channels_last)
        for layer, conv in enumerate(self.like.convs):
            assert isinstance(conv, nn.Conv2d)
            weight, bias = self._weight(layer), self.parameters.get(f"convs.{layer}.bias")
            x = F.conv2d(
                x,
                weight,
                None if bias is None else bias.flatten(),
                conv.stride,
                conv.padding,
                groups=x.shape[1] // weight.shape[1],
            )
            x = torch.relu(self._normalized(layer, x))
        features = x.reshape(len(x), len(self), -1).transpose(0, 1)
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
        """Return the weight that a layer convolves with: the filters of all members."""
        conv, prefix = self.like.convs[layer], f"convs.{layer}"
        if self.like.method is None or self.like.method.normalizes == "activation":
            return self.parameters[f"{prefix}.weight"].flatten(0, 1)
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
        return filters

    def _spectral(self, prefix: str, weight: Tensor, *, eps: float) -> Tensor:
        """Divide each member's matrix by its estimated largest singular value."""
        matrix, u, v = weight.flatten(2), self.buffers[f"{prefix}._u"], self.buffers[f"{prefix}._v"]
        if self.training:
            with torch.no_grad():
                u = F.normalize(_times(matrix, v), dim=1, eps=eps)
                v = F.normalize(_times(matrix.transpose(1, 2), u), dim=1, eps=eps)
            self.buffers |= {f"{prefix}._u": u, f"{prefix}._v": v}
        sigma = (u * _times(matrix, v)).sum(1)
        return (weight / sigma[:, None, None, None, None]).flatten(0, 1)

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
        of_one, eps = _groups(row, norm.size[0]), norm.eps_for(x)
        if of_one == 1 and row.centered:
            y = F.group_norm(x, len(self), eps=eps)
        else:  # for several groups, PyTorch's kernel is up to three times slower here
            y = _GroupNormalized.apply(x, len(self) * of_one, eps, row.centered)  # type: ignore[no-untyped-call]
        y = y * _beside(gain)
        return y if shift is None else y + _beside(shift)

    def _batch_norm(self, layer: int, x: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        norm, prefix = self.like.norms[layer], f"norms.{layer}"
        assert isinstance(norm, ActivationNorm)
        mean, var = (self.buffers[f"{prefix}.running_{what}"].view(-1) for what in ("mean", "var"))
        if self.training:
            self.buffers[f"{prefix}.num_batches_tracked"] += 1
        bias = None if shift is None else shift.flatten()
        assert norm.momentum is not None
        eps = norm.eps_for(x)
        return F.batch_norm(x, mean, var, gain.flatten(), bias, self.training, norm.momentum, eps)


def _groups(row: Method, channels: int) -> int:
    """How many groups of one member's channels are normalized on their own."""
    if "channel" not in row.inside:
        return channels
    return GROUPS if row.grouped else 1


class _GroupNormalized(torch.autograd.Function):
    r"""Normalize each image's channels in groups, over space; centred or not.

    With :math:`P` the mean over a group, :math:`y = r (x - P x)`, :math:`r = (P (x - P x)^2 +
    \epsilon)^{-1/2}`, and the gradient is :math:`r (g - y P(g y) - P g)`: two sums per pass along
    memory in channels-last, where PyTorch's reductions over channels and space go across it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, eps: float, centered: bool) -> Tensor:
        ctx.groups, ctx.centered = groups, centered
        v = x.permute(0, 2, 3, 1).flatten(1, 2)
        if centered:
            v = v - _group_mean(v, groups)
        scale = (_group_mean(v * v, groups) + eps).rsqrt()
        y = v * scale
        ctx.save_for_backward(y, scale)
        return torch.unflatten(y, 1, x.shape[2:]).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        y, scale = ctx.saved_tensors
        (gradient,) = gradients
        g = gradient.permute(0, 2, 3, 1).flatten(1, 2)
        slope = torch.addcmul(g, y, _group_mean(g * y, ctx.groups), value=-1)
        if ctx.centered:
            slope -= _group_mean(g, ctx.groups)
        slope *= scale
        back = torch.unflatten(slope, 1, gradient.shape[2:]).permute(0, 3, 1, 2)
        return back, None, None, None


def _group_mean(v: Tensor, groups: int) -> Tensor:
    """Mean over space and a group's channels, shape ``(batch, 1, channels)``.

    Args:
        v: shape ``(batch, space, channels)``.
        groups: how many consecutive channels form a group.
    """
    by_channel = v.mean(1, keepdim=True)
    if groups == v.shape[2]:
        return by_channel
    by_group = torch.unflatten(by_channel, 2, (groups, -1)).mean(3, keepdim=True)
    return by_group.expand(-1, -1, -1, v.shape[2] // groups).flatten(2)


def _beside(learned: Tensor) -> Tensor:
    """Lay the members' gains (or shifts) out as activations lie in memory."""
    if learned.ndim == 2:
        return learned.reshape(-1, 1, 1)
    flat = learned.flatten(0, 1)[None]
    return flat.contiguous(memory_format=torch.channels_last)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Multiply a matrix and a vector per member."""
    return torch.bmm(matrix, vector[:, :, None])[:, :, 0]
