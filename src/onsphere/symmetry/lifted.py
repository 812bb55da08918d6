"""Run a model's operations in float64 whatever it casts to, with eps at almost 0 where asked.

Two modes stand over the model while a probe runs it: one below autograd, which lifts every cast to
a smaller dtype and replaces the eps that the exact analysis found; one above, which writes
BatchNorm with running statistics out, so that it has gradients for them.
"""

from collections import defaultdict
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from onsphere.symmetry.operation import EpsSite

TINY = 1e-30
"""What replaces an eps: PyTorch refuses 0 in places, and this is far below rounding."""

_SMALL_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})


class Lifted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in float64 whatever the model casts to, and replaces eps where asked.

    The mode works below autograd, and stays on during the backward pass.

    Args:
        sites: the eps that the exact analysis found.
        real_eps: leave them as they are.
    """

    def __init__(self, sites: Sequence[EpsSite], real_eps: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: defaultdict[tuple[str, str], set[float]] = defaultdict(set)
        for site in () if real_eps else sites:
            self.values[site.where, site.operation.rstrip("_")].add(site.value)
        self.fused = set() if real_eps else {s.value for s in sites if "norm" in s.operation}
        self.where = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name == "aten::embedding_dense_backward":
            args = (*args[:3], -1, *args[4:])  # the padding row acts on the output like any other
        args = tuple(map(_in_float64, args))
        kwargs = {k: _in_float64(v) for k, v in kwargs.items()} if kwargs else {}
        args = self._without_eps(func, name, args)
        if name == "aten::_grouped_mm":
            return _grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)

    def _without_eps(self, func: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if "norm" in name and self.fused:
            schema = [a.name for a in func._schema.arguments]
            for key in ("eps", "epsilon"):
                i = schema.index(key) if key in schema else len(args)
                if i < len(args):
                    return (*args[:i], TINY, *args[i + 1 :])
            return args
        values = self.values.get((self.where, name.rstrip("_"))) if self.values else None
        if not values:
            return args
        return tuple(_replaced(a, values) for a in args)


def _in_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.float64) if value.dtype in _SMALL_FLOATS else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _SMALL_FLOATS else value
    if isinstance(value, list | tuple):
        return type(value)(map(_in_float64, value))
    return value


def _replaced(value: Any, values: set[float]) -> Any:
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.dtype == torch.float64 and not value.requires_grad:
            near = any(abs(float(value) - v) <= 1e-6 * abs(v) for v in values)
            return torch.full_like(value, TINY) if near else value
        return value
    return min(value, TINY) if isinstance(value, float) and value in values else value


class Composed(TorchFunctionMode):
    """Writes BatchNorm with running statistics out, so that it has gradients for them.

    Args:
        real_eps: leave the eps as it is.
    """

    def __init__(self, real_eps: bool) -> None:
        super().__init__()
        self.real_eps = real_eps

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.batch_norm and not args[5] and args[3] is not None:
            x, weight, bias, mean, var, _, _, eps, *_ = args
            return self._batch_norm(x, mean, var, weight, bias, eps)
        if func is nn.functional.batch_norm:
            bound = signature(nn.functional.batch_norm).bind(*args, **kwargs)
            bound.apply_defaults()
            if not bound.arguments.pop("training") and bound.arguments["running_mean"] is not None:
                bound.arguments.pop("momentum")
                return self._batch_norm(**bound.arguments)
        return func(*args, **kwargs)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Any,
        bias: Any,
        eps: float,
    ) -> Tensor:
        shape = (1, -1, *([1] * (input.ndim - 2)))
        scale = (running_var + (eps if self.real_eps else TINY)).rsqrt()
        scale = scale if weight is None else scale * weight
        y = (input - running_mean.reshape(shape)) * scale.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    """Multiply groups of rows by their own matrix, in the dtype given (the kernel is bf16 only)."""
    if offs is None:
        return a @ b
    ends = offs.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if a.ndim == 2 and b.ndim == 3:
        out = a.new_zeros(a.shape[0], b.shape[-1])
        for g, (i, j) in enumerate(spans):
            out[i:j] = a[i:j] @ b[g]
        return out
    if a.ndim == 2 and b.ndim == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])
    return torch.cat([a[g] @ b[:, i:j] for g, (i, j) in enumerate(spans)], dim=-1)
