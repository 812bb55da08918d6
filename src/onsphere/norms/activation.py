"""Activation norms as modules, made from rows of the table and routed to PyTorch's kernels."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onsphere.geometry import normalize
from onsphere.norms.batch_statistics import batch_norm, l1_batch_norm, sync_batch_norm
from onsphere.norms.methods import method as method_of
from onsphere.norms.row import Method


class ActivationNorm(nn.Module):
    r"""A normalization of activations: :math:`y = \gamma\,N(x) + \beta`.

    Same defaults, numbers, train and eval behaviour and state dict as the ``torch.nn`` module of
    the method; one class for any number of spatial axes. Input and output have the shape
    ``(batch, channel, *space)``, or ``(*batch, *size)`` for methods that normalize whole samples
    (LayerNorm, RMSNorm, ScaleNorm).

    Args:
        method: a row of the table, or its key.
        size: number of channels; for LayerNorm, RMSNorm and ScaleNorm the trailing shape that
            forms one vector (an int or a tuple).
        num_groups: number of groups, for GroupNorm (which needs it).
        eps: ``None`` takes the method's default.
        affine: learn a gain (and shift, where the method has one); ``None`` takes PyTorch's
            default, which is False for InstanceNorm and True for the others.
        momentum: weight of the newest batch in the running statistics; ``None`` averages all
            batches equally. Only for methods with batch statistics.
        track_running_stats: keep running statistics for eval mode (BatchNorm, InstanceNorm);
            ``None`` takes PyTorch's default, which is True for the kinds of BatchNorm alone.
        device: where parameters live.
        dtype: their type.

    Raises:
        ValueError: a weight method, a size that does not fit the method, channels that do not
            divide into groups.

    Example:
        >>> import torch
        >>> x = torch.randn(16, 8, 5, 5, generator=torch.Generator().manual_seed(0))
        >>> y = ActivationNorm("bn", 8)(x)
        >>> torch.allclose(y.square().mean((0, 2, 3)), torch.ones(8), atol=1e-4)   # |y| = sqrt(n)
        True

    Source: the row's, see :data:`onsphere.norms.METHODS`.
    """

    # As torch's BatchNorm: state dicts before version 2 lack num_batches_tracked.
    _version = 2

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        method: Method | str,
        size: int | tuple[int, ...],
        *,
        num_groups: int | None = None,
        eps: float | None = None,
        affine: bool | None = None,
        momentum: float | None = 0.1,
        track_running_stats: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.method = row = method_of(method) if isinstance(method, str) else method
        if row.normalizes != "activation":
            raise ValueError(f"{row.name} normalizes weights; use onsphere.norms.parametrize")
        self.size, self.num_groups = _checked_size(row, size, num_groups)
        self.eps = row.eps if eps is None else eps
        self.momentum = momentum
        if affine and row.affine == "none":
            raise ValueError(f"{row.name} has no gain or shift to learn; leave affine out")
        self.affine = row.key != "in" and row.affine != "none" if affine is None else affine
        tracks = row.statistics == "batch" if track_running_stats is None else track_running_stats
        if tracks and not self._can_track():
            raise ValueError(f"{row.name} has no running statistics to track")
        self.track_running_stats = tracks

        shape = () if row.affine == "scalar" else self.size
        gain = torch.empty(shape, device=device, dtype=dtype) if self.affine else None
        self.register_parameter("weight", None if gain is None else nn.Parameter(gain))
        if row.shift:
            shift = None if gain is None else nn.Parameter(torch.empty_like(gain))
            self.register_parameter("bias", shift)
        else:
            self.bias = None
        self._register_statistics(device, dtype)
        self.reset_parameters()

    def _can_track(self) -> bool:
        """Statistics of batches can be averaged over them, and PyTorch does it for InstanceNorm."""
        return self.method.statistics == "batch" or self.method.key == "in"

    def _register_statistics(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        track = self.track_running_stats
        mean = torch.zeros(self.size, device=device, dtype=dtype) if track else None
        seen = torch.tensor(0, dtype=torch.long, device=device) if track else None
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", None if mean is None else torch.ones_like(mean))
        self.register_buffer("num_batches_tracked", seen)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, then apply the learned gain and shift.

        Raises:
            ValueError: ``x`` has no batch axis or another number of channels.
        """
        if not self.method.takes_shape and (x.ndim < 2 or x.shape[1] != self.size[0]):
            raise ValueError(
                f"{self.method.name} expects (batch, {self.size[0]} channels, *space), got shape "
                f"{tuple(x.shape)}"
            )
        kernel = _KERNELS.get(self.method.key)
        return kernel(self, x) if kernel else self.reference(x)

    def reference(self, x: Tensor) -> Tensor:
        r"""Compute the same in pure PyTorch, straight from the lemma, with batch statistics.

        Args:
            x: as for :meth:`forward`.

        Returns:
            :math:`\gamma\,N(x) + \beta`; equal to :meth:`forward` in training mode up to rounding.
        """
        trailing = len(self.size) if self.method.takes_shape else None
        axes = self.method.vector_axes(x.ndim, self.num_groups, trailing)
        vectors = axes.gather(x)
        map = self.method.sphere_map(vectors.shape[-1], self.eps_for(x))
        return self.gain_and_shift(axes.scatter(normalize(vectors, map), x.shape))

    def gain_and_shift(self, y: Tensor) -> Tensor:
        """Apply what was learned to normalized activations."""
        by = self.method.affine
        spread = {"channel": (-1, *([1] * (y.ndim - 2))), "scalar": ()}.get(by, self.size)
        if self.weight is not None:
            y = y * self.weight.reshape(spread)
        return y if self.bias is None else y + self.bias.reshape(spread)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set gain, shift and running statistics to what they are in a new module."""
        scalar = self.method.affine == "scalar"
        for start, value in (
            (self.weight, math.prod(self.size) ** 0.5 if scalar else 1.0),
            (self.running_var, 1.0),
        ):
            if start is not None:
                start.fill_(value)
        for zeros in (self.bias, self.running_mean, self.num_batches_tracked):
            if zeros is not None:
                zeros.zero_()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        seen = f"{prefix}num_batches_tracked"
        old = (local_metadata.get("version") or 0) < 2
        if old and self.num_batches_tracked is not None and seen not in state_dict:
            state_dict[seen] = torch.zeros((), dtype=torch.long)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def eps_for(self, x: Tensor) -> float:
        """Return the eps in force for ``x``: the one given, or the machine epsilon of its dtype."""
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps

    def extra_repr(self) -> str:
        """Return the row and the options that were chosen."""
        size = self.size[0] if len(self.size) == 1 else self.size
        groups = f", num_groups={self.num_groups}" if self.method.grouped else ""
        return f"{self.method.key!r}, {size}{groups}, eps={self.eps}, affine={self.affine}"


def _checked_size(
    row: Method, size: int | tuple[int, ...], num_groups: int | None
) -> tuple[tuple[int, ...], int]:
    shape = (size,) if isinstance(size, int) else tuple(size)
    if not shape or any(extent < 1 for extent in shape):
        raise ValueError(f"{row.name} needs a positive size, got {size}")
    if not row.takes_shape and len(shape) != 1:
        raise ValueError(f"{row.name} takes a number of channels, got {size}")
    if row.grouped:
        if num_groups is None or num_groups < 1 or shape[0] % num_groups:
            raise ValueError(
                f"{row.name} needs groups that divide {shape[0]} channels, got "
                f"num_groups={num_groups}"
            )
        return shape, num_groups
    if num_groups is not None:
        raise ValueError(f"{row.name} has no groups, got num_groups={num_groups}")
    return shape, 1


def _instance_norm(norm: ActivationNorm, x: Tensor) -> Tensor:
    from_input = norm.training or norm.running_mean is None
    factor = 0.0 if norm.momentum is None else norm.momentum
    statistics = (norm.running_mean, norm.running_var)
    eps = norm.eps_for(x)
    return F.instance_norm(x, *statistics, norm.weight, norm.bias, from_input, factor, eps)


def _group_norm(norm: ActivationNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps_for(x))


def _layer_norm(norm: ActivationNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.size, norm.weight, norm.bias, norm.eps_for(x))


def _rms_norm(norm: ActivationNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, list(norm.size), norm.weight, norm.eps)


_KERNELS: dict[str, Callable[[ActivationNorm, Tensor], Tensor]] = {
    "bn": batch_norm,
    "sbn": sync_batch_norm,
    "l1bn": l1_batch_norm,
    "in": _instance_norm,
    "gn": _group_norm,
    "ln": _layer_norm,
    "rms": _rms_norm,
}
"""PyTorch's own kernel for each method that has one; other rows run the reference."""
