"""Run a model in float64, with eps at its real value or at almost 0, at chosen weights.

A probe is the numeric half of the analysis: it evaluates outputs at rescaled weights, and the
gradients of random combinations of the outputs. Casts to a smaller dtype inside the model are
lifted, so that the noise is that of float64.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from onsphere.symmetry.operation import EpsSite
from onsphere.symmetry.trace import (
    OutputPicker,
    Trace,
    bare_name,
    call,
    float_outputs,
    module_paths,
    plain_execution,
    unwrapped,
    weights,
)

TINY = 1e-30
"""What replaces an eps: PyTorch refuses 0 in places, and this is far below rounding."""

_SMALL_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Point:
    """Where a model is evaluated.

    Args:
        state: every parameter and buffer by the model's own name, in float64.
        args: positional inputs.
        kwargs: keyword inputs.
    """

    state: Mapping[str, Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Gradients:
    """Gradients of one random combination of the outputs.

    Args:
        by_name: gradient of every weight the output depends on.
        output: Euclidean norm of all outputs together.
    """

    by_name: Mapping[str, Tensor]
    output: float


class _Lifted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in float64 whatever the model casts to, and replaces eps where asked.

    The mode works below autograd, and stays on during the backward pass.
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
        args, kwargs = tree_map(self._lift, (tuple(args), dict(kwargs or {})))
        args = self._without_eps(func, name, tuple(args))
        if name == "aten::_grouped_mm":
            return _grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _lift(value: Any) -> Any:
        if value in _SMALL_FLOATS if isinstance(value, torch.dtype) else False:
            return torch.float64
        if isinstance(value, Tensor) and value.dtype in _SMALL_FLOATS:
            return value.to(torch.float64)
        return value

    def _without_eps(self, func: Any, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        schema = [a.name for a in func._schema.arguments]
        if "norm" in name and self.fused:
            for key in ("eps", "epsilon"):
                i = schema.index(key) if key in schema else len(args)
                if i < len(args):
                    return (*args[:i], TINY, *args[i + 1 :])
            return args
        values = self.values.get((self.where, name.rstrip("_")))
        if not values:
            return args
        return tuple(self._replaced(a, values) for a in args)

    @staticmethod
    def _replaced(value: Any, values: set[float]) -> Any:
        if isinstance(value, Tensor):
            if value.numel() == 1 and value.dtype == torch.float64 and not value.requires_grad:
                near = any(abs(float(value) - v) <= 1e-6 * abs(v) for v in values)
                return torch.full_like(value, TINY) if near else value
            return value
        return min(value, TINY) if isinstance(value, float) and value in values else value


class _Composed(TorchFunctionMode):
    """Writes BatchNorm with running statistics out, so that it has gradients for them."""

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
    starts = [0, *ends[:-1]]
    if a.ndim == 2 and b.ndim == 3:
        out = a.new_zeros(a.shape[0], b.shape[-1])
        for g, (i, j) in enumerate(zip(starts, ends, strict=True)):
            out[i:j] = a[i:j] @ b[g]
        return out
    if a.ndim == 2 and b.ndim == 2:
        pairs = zip(starts, ends, strict=True)
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in pairs])
    pairs = zip(starts, ends, strict=True)
    return torch.cat([a[g] @ b[:, i:j] for g, (i, j) in enumerate(pairs)], dim=-1)


class Probe:
    """A model that can be evaluated in float64 at any weights.

    Args:
        model: the module; it is never changed.
        args: positional inputs.
        kwargs: keyword inputs.
        traced: what the exact analysis said, for the eps sites and the written buffers.
        output: picks the tensors to keep fixed.
        seed: seed of everything random here.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        traced: Trace,
        *,
        output: OutputPicker | None = None,
        seed: int = 0,
    ) -> None:
        self.model = unwrapped(model)
        self.traced, self.output = traced, output
        self.generator = torch.Generator().manual_seed(seed)
        parameters, buffers = weights(self.model)
        own = {**parameters, **buffers}
        self.own_name = {bare_name(n): n for n in own}
        self.names = [n for n in self.own_name if n not in traced.written]
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self._given = Point(
            {n: _float64(t) for n, t in state.items()},
            tuple(tree_map(_float64, tuple(args))),
            tree_map(_float64, dict(kwargs)),
        )

    def given(self) -> Point:
        """Return the model's own weights and inputs."""
        return self._given

    def redrawn(self, noise: float = 0.5, size: float = 1.0) -> Point:
        """Return random weights near the model's own (signs of one-signed tensors kept).

        Args:
            noise: how far they move, relative to their size.
            size: factor on matrices; less than 1 opens saturated softmaxes and gates.

        A symmetry holds everywhere; at special weights (ones, zeros, a closed gate) more can
        seem to hold.
        """
        weights_ = set(self.own_name.values())
        state = {
            n: self._shaken(t, noise) * (size if t.ndim > 1 else 1.0) if n in weights_ else t
            for n, t in self._given.state.items()
        }
        args = tree_map(lambda t: self._shaken(t, noise), self._given.args)
        return Point(state, args, tree_map(lambda t: self._shaken(t, noise), self._given.kwargs))

    def nudged(self, point: Point, amount: float) -> Point:
        """Return a point with every weight off by a relative ``amount``, as rounding would do.

        The same along the first axis: enough to see the effect, and cheap for large tables.
        """
        own = set(self.own_name.values())
        state = {
            n: t * (1 + amount * self._normal_like(t[:1])) if n in own and t.ndim else t
            for n, t in point.state.items()
        }
        return Point(state, point.args, point.kwargs)

    def rescaled(self, point: Point, exponents: Mapping[str, float]) -> Point:
        """Return the point with every named weight multiplied by ``exp`` of its number."""
        state = dict(point.state)
        for name, power in exponents.items():
            own = self.own_name[name]
            state[own] = state[own] * torch.tensor(power, dtype=torch.float64).exp()
        return Point(state, point.args, point.kwargs)

    def outputs(self, point: Point, *, real_eps: bool = False) -> list[Tensor]:
        """Evaluate the model."""
        with torch.no_grad():
            return [t.clone() for t in self._run(point, point.state, real_eps)]

    def gradients(self, point: Point, count: int, *, real_eps: bool = False) -> Iterator[Gradients]:
        """Yield the gradients of ``count`` random combinations of the outputs."""
        state = dict(point.state)
        leaves = {}
        for name in self.names:
            own = self.own_name[name]
            leaves[name] = state[own] = state[own].detach().clone().requires_grad_()
        mode = self._mode(real_eps)
        with plain_execution(), torch.enable_grad():
            outputs = self._run(point, state, real_eps, mode)
            outputs = [t for t in outputs if t.requires_grad]
            if not outputs:
                return
            norm = float(sum(t.detach().abs().square().sum() for t in outputs)) ** 0.5
            for _ in range(count):
                cotangents = [self._normal_like(t) for t in outputs]
                with mode:
                    found = torch.autograd.grad(
                        outputs,
                        list(leaves.values()),
                        cotangents,
                        retain_graph=True,
                        allow_unused=True,
                    )
                pairs = zip(leaves, found, strict=True)
                yield Gradients({n: g for n, g in pairs if g is not None}, norm)

    def _mode(self, real_eps: bool) -> _Lifted:
        return _Lifted(self.traced.eps, real_eps)

    def _run(
        self, point: Point, state: Mapping[str, Tensor], real_eps: bool, mode: Any = None
    ) -> list[Tensor]:
        mode = mode or self._mode(real_eps)

        def enter(path: str) -> None:
            mode.where = bare_name(path)

        buffers = {n for n, _ in self.model.named_buffers()}
        fresh = {
            n: t.clone() if n in buffers and not t.requires_grad else t for n, t in state.items()
        }
        composed = _Composed(real_eps)
        args, kwargs = tree_map(_cloned, (point.args, dict(point.kwargs)))
        with plain_execution(), module_paths(self.model, enter), mode, composed:
            return float_outputs(call(self.model, fresh, args, kwargs), self.output)

    def _normal_like(self, t: Tensor) -> Tensor:
        return torch.randn(t.shape, dtype=t.dtype, generator=self.generator).to(t.device)

    def _shaken(self, t: Any, noise: float) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        draw = torch.randn(t.numel(), dtype=torch.float32, generator=self.generator)
        spread = draw.to(t).reshape(t.shape)
        factor = (noise * spread).exp()
        if t.numel() and (bool((t > 0).all()) or bool((t < 0).all())):
            return t * factor
        if not bool(t.isfinite().all()):  # a mask: leave it alone
            return t
        size = float(t.abs().mean()) or 0.1
        return t * factor + noise * size * draw.roll(1).to(t).reshape(t.shape)


def _float64(t: Any) -> Any:
    if isinstance(t, Tensor):
        t = t.detach()
        return t.to(torch.float64) if t.is_floating_point() else t
    return t


def _cloned(t: Any) -> Any:
    return t.clone() if isinstance(t, Tensor) else t
