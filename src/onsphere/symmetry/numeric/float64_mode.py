"""Run a model's operations in float64 whatever it casts to, with eps at almost 0 where asked.

Two modes stand over the model while a probe runs it: one below autograd, which keeps every tensor
in float64 and replaces the eps that the exact analysis found; one above, which writes BatchNorm
with running statistics out, so that it has gradients for them.

All else is as in the model. What it makes is made in float64 at once, so that writing into it
writes into it; a shorter tensor that comes from elsewhere has one twin in float64 for all its
views; random numbers are drawn in the type in which the model draws them, and so are the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from onsphere._torch.memory import LARGE, empty
from onsphere._torch.operations import OperationsMode
from onsphere.symmetry.exact.eps_sites import EPS_NAMES, EpsSite, NotedEps, Occurrences
from onsphere.symmetry.exact.overloads import Overload, overload_of
from onsphere.symmetry.exact.writes import OwnMemory

TINY = 1e-30
"""What replaces an eps: PyTorch refuses 0 in places, and this is far below rounding."""

_NATIVE = "aten::"
"""What the names of PyTorch's own operations begin with."""
_PRECISION = torch.finfo(torch.float64).eps
_SMALL_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
_WIDE = dict.fromkeys(_SMALL_FLOATS, torch.float64)
_WIDE |= dict.fromkeys((torch.complex64, torch.complex32), torch.complex128)
"""Short types, and what everything is computed in instead."""
_ATOMS = frozenset({int, float, bool, type(None), str})
"""What an argument of an operation is mostly, beside tensors."""
_INTEGERS = frozenset({int})
_PADDED = ("embedding_dense_backward", "embedding_sparse_backward")
_CONVOLUTIONS = {"convolution": 8, "convolution_backward": 9}
"""And which of their arguments is the number of groups."""
_IN_ITS_OWN_WAY = frozenset({*_PADDED, *_CONVOLUTIONS, "_grouped_mm"})
_NORMS = {
    "native_batch_norm": 1, "_native_batch_norm_legit": 1, "_batch_norm_with_update": 1,
    "native_group_norm": 1, "native_layer_norm": 2,
}  # fmt: skip
"""Norms that give means and deviations too, and which argument behind the first is a bias."""
_EQUAL = 1e10
"""How many times its deviation a mean is where all numbers are equal, up to rounding."""


class Float64Mode(OperationsMode):  # type: ignore[no-untyped-call]
    """Computes in float64 whatever the model casts to, and replaces eps where asked.

    The mode works below autograd, and stays on during the backward pass.

    Args:
        sites: the eps that the exact analysis found.
        real_eps: leave them as they are.
        draws: the type in which the model draws random numbers, by place and operation.
        precisions: the model's own ``torch.finfo(x.dtype).eps``, by place and operation.
        tiny: what replaces eps, in turn.
    """

    def __init__(
        self,
        sites: Sequence[EpsSite],
        real_eps: bool,
        draws: Mapping[tuple[str, str], torch.dtype] | None = None,
        precisions: Mapping[tuple[str, str], float] | None = None,
        tiny: Sequence[float] = (TINY,),
    ) -> None:
        super().__init__()
        self._memory = OwnMemory(())
        moved = () if real_eps else sites
        self.sites = {site.key for site in moved if site.key is not None}
        self.places = {key[:2] for key in self.sites}
        self.noted = NotedEps(moved)
        self.native = any(site.argument and site.operation.startswith(_NATIVE) for site in moved)
        self.draws = dict(draws or {})
        self.precisions = dict(precisions or {})
        self._next_tiny = cycle(tiny)
        self.where = ""
        self.backward = False
        self._occurrences = Occurrences()
        self._twins: dict[int, tuple[Any, Tensor]] = {}

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operation in float64."""
        overload = overload_of(func)
        if overload.writes:
            self._memory.before(overload, args, kwargs)
        result = self._in_float64(overload, args, kwargs)
        self._memory.after(overload, args, result)
        return result

    def _in_float64(self, overload: Overload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        func, name = overload.func, overload.short
        if overload.draws and not self.backward:
            return _Draw(overload, self.draws.get((self.where, name)), self.lift)(args, kwargs)
        lift = self.lift
        args = tuple([
            a if type(a) in _ATOMS or (type(a) is Tensor and a.dtype is torch.float64) else lift(a)
            for a in args
        ])  # fmt: skip
        kwargs = {k: lift(v) for k, v in kwargs.items()} if kwargs else kwargs
        if self.precisions and not self.backward:
            own = self.precisions.get((self.where, name), _PRECISION)
            args = tuple(own if type(a) is float and a == _PRECISION else a for a in args)
        if self.native and "norm" in name and overload.name.startswith(_NATIVE):
            args = self._with_tiny_eps(overload, args)
        elif (self.where, overload.name) in self.noted.places and not self.backward:
            args, kwargs = self.with_noted_eps(overload, args, kwargs)
        elif self.places and not self.backward and (self.where, name) in self.places:
            args, kwargs = self._without_eps(func, args, kwargs)
        if name in _IN_ITS_OWN_WAY:
            return _in_its_own_way(name, func, args, kwargs)
        result = _fresh(func(*args, **kwargs))
        if name in _NORMS and self.native and not self.backward:
            return _without_noise(name, result, *args)
        return result

    @contextmanager
    def keeping(self, tensors: Iterable[Tensor], all_else: bool = False) -> Iterator[None]:
        """Run what is inside in this mode, and give tensors back what they held.

        Args:
            tensors: those that no run may change.
            all_else: whether it may change nothing else either that was there before it.
        """
        self._memory = OwnMemory(tensors, all_else)
        try:
            with self:
                yield
        finally:
            self._memory.put_back()
            self._memory = OwnMemory(())

    def lift(self, value: Any) -> Any:
        """Return a value in float64: numbers of shorter types, and the types themselves."""
        if type(value) in _ATOMS:
            return value
        if isinstance(value, Tensor):
            return self._twin(value) if value.dtype in _WIDE else value
        if isinstance(value, torch.dtype):
            return _WIDE.get(value, value)
        if isinstance(value, (list, tuple)) and not _INTEGERS.issuperset(map(type, value)):
            return type(value)(map(self.lift, value))
        return value

    def _twin(self, value: Tensor) -> Tensor:
        if value.layout is not torch.strided:
            return wide(value)
        storage = value.untyped_storage()
        if storage._cdata not in self._twins:
            flat = torch.empty(0, dtype=value.dtype, device=value.device)
            count = storage.nbytes() // value.element_size()
            whole = wide(flat.set_(storage, 0, (count,), (1,)))
            self._twins[storage._cdata] = (storage, whole)
        whole = self._twins[storage._cdata][1]
        return whole.as_strided(value.size(), value.stride(), value.storage_offset())

    def with_noted_eps(
        self, overload: Overload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace what a rule of this operation says is an eps."""
        if (self.where, overload.name) not in self.noted.places:
            return args, kwargs
        return self.noted.replaced(self.where, overload, args, kwargs, self._tiny)

    def _with_tiny_eps(self, overload: Overload, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace the eps of one of PyTorch's own normalizations, or of its derivative."""
        for i, name in enumerate(overload.arguments):
            if name in EPS_NAMES and i < len(args):
                return (*args[:i], next(self._next_tiny), *args[i + 1 :])
        return args

    def _without_eps(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        met = self._occurrences.met(self.where, func, args, kwargs, float)
        for place, key in met.items():
            if key in self.sites and isinstance(place, int):
                args = (*args[:place], self._tiny(args[place]), *args[place + 1 :])
            elif key in self.sites:
                kwargs = {**kwargs, str(place): self._tiny(kwargs[str(place)])}
        return args, kwargs

    def _tiny(self, value: Any) -> Any:
        tiny = next(self._next_tiny)
        if isinstance(value, Tensor):
            return torch.full_like(value, tiny).copysign(value)
        return tiny if value is None or value >= 0 else -tiny


def _without_noise(name: str, result: Any, input: Tensor, *args: Any) -> Any:
    """Let a norm give its bias where all that it divides is equal, up to rounding.

    There rounding is divided by a tiny eps, and would be as large as any signal.
    """
    out, mean, inverse, *rest = result
    equal = mean.abs() * inverse > _EQUAL
    if not bool(equal.any()):
        return result
    bias: Tensor = args[_NORMS[name]]
    bias = input.new_zeros(()) if bias is None else bias
    if name != "native_layer_norm":
        space = (1,) * (input.ndim - 2)
        channels = equal.reshape(-1 if equal.ndim > 1 else 1, equal.shape[-1])
        channels = channels.repeat_interleave(input.shape[1] // equal.shape[-1], 1)
        shown, bias = channels.reshape(*channels.shape, *space), bias.reshape(-1, *space)
    else:
        shown = equal
    return (torch.where(shown, bias, out), mean, inverse.masked_fill(equal, 0.0), *rest)


def _in_its_own_way(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one of the few operations that are not run as the model calls them."""
    if name == "_grouped_mm":
        return _grouped_mm(*args, **kwargs)
    if name in _PADDED:
        args = (*args[:3], -1, *args[4:])  # the padding row acts on the output like any other
    elif args[_CONVOLUTIONS[name]] > 1:
        return _fresh(_grouped(func, *args, **kwargs))
    return _fresh(func(*args, **kwargs))


def _fresh(value: Any) -> Any:
    """Return a result in float64: what was made just now is seen by nobody else."""
    if type(value) is Tensor and value.dtype is torch.float64:  # as nearly all are
        return value
    if isinstance(value, Tensor):
        return wide(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_fresh, value))
    return value


def wide(t: Tensor) -> Tensor:
    """Return a tensor of a short type in float64, or in complex numbers of it."""
    if t.dtype not in _WIDE:
        return t
    plain = type(t) is Tensor and not t.requires_grad
    if t.numel() >= LARGE and plain and t.is_contiguous():
        return empty(t.shape, _WIDE[t.dtype], t.device).copy_(t)
    return t.to(_WIDE[t.dtype])


class _Draw:
    """Draws random numbers in the type in which the model draws them.

    Args:
        overload: the operation.
        dtype: that type; ``None`` where the model was not seen to draw there.
        lift: brings a value into float64.
    """

    def __init__(
        self, overload: Overload, dtype: torch.dtype | None, lift: Callable[[Any], Any]
    ) -> None:
        self.overload, self.dtype, self.lift = overload, dtype, lift
        self.func, self.name = overload.func, overload.short

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Draw; the result is in float64."""
        args, kwargs = tuple(map(self.lift, args)), {k: self.lift(v) for k, v in kwargs.items()}
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if self.dtype not in _SMALL_FLOATS:
            result = self.func(*args, **kwargs)
        elif self.name in ("native_dropout", "_fused_dropout"):
            return self._dropout(*args)
        elif self.name.startswith("rrelu"):
            return self._rrelu(*args)
        elif self.overload.name.endswith("_"):
            drawn = self.func(args[0].to(self.dtype), *self._short(args[1:]), **self._short(kwargs))
            return args[0].copy_(drawn)
        elif tensors and "like" not in self.name:
            result = self.func(*self._short(args), **self._short(kwargs))
        elif "dtype" in self.overload.arguments:
            result = self.func(*args, **{**kwargs, "dtype": self.dtype})
        else:
            result = self.func(*args, **kwargs)
        return _fresh(result)

    def _short(self, values: Any) -> Any:
        def short(t: Any) -> Any:
            return t.to(self.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

        return tree_map(short, values)

    def _dropout(self, x: Tensor, p: float, *rest: Any) -> tuple[Tensor, Tensor]:
        _, mask = self.func(torch.ones_like(x, dtype=self.dtype), p, *rest)
        return x * mask / (1 - p if p < 1 else 1.0), mask

    def _rrelu(self, x: Tensor, noise: Tensor, *rest: Any) -> Tensor:
        short = noise.to(self.dtype)
        self.func(x.to(self.dtype), short, *rest)
        return x * noise.copy_(short) if rest[2] else self.func(x, noise, *rest)


class Composed(TorchFunctionMode):
    """Writes out norms with running statistics, so that they have gradients for these.

    To operations that are not PyTorch's own it hands almost 0 for an eps before autograd sees it:
    a derivative that is written by hand keeps what it is given.

    Args:
        mode: runs the operations.
        real_eps: leave the eps as it is.
    """

    _FUNCTIONAL = (nn.functional.batch_norm, nn.functional.instance_norm)
    _PLAIN = (
        torch.batch_norm, torch.ops.aten.batch_norm.default,
        torch.instance_norm, torch.ops.aten.instance_norm.default,
    )  # fmt: skip

    def __init__(self, mode: Float64Mode, real_eps: bool) -> None:
        super().__init__()
        self.mode, self.real_eps = mode, real_eps

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.mode.noted.places and (overload := _single_overload(func)) is not None:
            args, kwargs = self.mode.with_noted_eps(overload, tuple(args), kwargs)
        if func in self._FUNCTIONAL:
            bound = signature(func).bind(*args, **kwargs)
            bound.apply_defaults()
            x, mean, var, weight, bias, by_input, _, eps, *_ = bound.args
        elif func in self._PLAIN and len(args) > 7:
            x, weight, bias, mean, var, by_input, _, eps, *_ = args
        else:
            return func(*args, **kwargs)
        if by_input or mean is None:
            return func(*args, **kwargs)
        return self._batch_norm(x, mean, var, weight, bias, eps)

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


def _single_overload(func: Any) -> Overload | None:
    """Return the operation that is called, if it is one, and its arguments say of which types."""
    if isinstance(func, OpOverloadPacket):
        overloads = func.overloads()  # type: ignore[no-untyped-call]
        func = getattr(func, overloads[0]) if len(overloads) == 1 else None
    return overload_of(func) if isinstance(func, OpOverload) else None


def _grouped(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Convolve in groups, images with channels last as if they came first.

    In float64 PyTorch has no kernel of its own for groups, and takes ten times as long for these.
    """
    last = torch.channels_last
    tensors = [a for a in args if isinstance(a, Tensor) and a.ndim == 4]
    if all(t.is_contiguous() for t in tensors):
        return func(*args, **kwargs)
    results = func(*(a.contiguous() if isinstance(a, Tensor) else a for a in args), **kwargs)
    ordered = tensors[0].is_contiguous(memory_format=last) and not tensors[0].is_contiguous()
    return tree_map(
        lambda t: t.contiguous(memory_format=last)
        if ordered and isinstance(t, Tensor) and t.ndim == 4 else t, results,
    )  # fmt: skip


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
