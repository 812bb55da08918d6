"""Convolutions and linear maps that compute their weight in ``forward``: weight standardization."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from onsphere._torch.copies import copy_of
from onsphere._torch.execution import ModelError, OutputPicker, plain_execution
from onsphere.symmetry.rewrite.verification import outputs_as_it_computes, watched_inputs, widened

_CLASSES: dict[Any, type[nn.Module]] = {
    nn.functional.linear: nn.Linear,
    nn.functional.conv1d: nn.Conv1d,
    nn.functional.conv2d: nn.Conv2d,
    nn.functional.conv3d: nn.Conv3d,
}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SAME = 1e-12


@dataclass(frozen=True, eq=False)
class ForwardWeight:
    """A module whose ``forward`` computes a weight and does one linear map with it.

    Args:
        path: of the module.
        how: its class.
        plain: PyTorch's own module of the same map, in float64.
        reason: why it cannot take its place; empty if it can.
    """

    path: str
    how: str
    plain: nn.Module
    reason: str = ""

    @property
    def weight(self) -> str:
        """The full name of the weight."""
        return f"{self.path}.weight"

    def values(self) -> dict[str, Tensor]:
        """Return weight and bias in float64, by name."""
        return {f"{self.path}.{n}": p.detach().clone() for n, p in self.plain.named_parameters()}

    def module_like(self, module: nn.Module) -> nn.Module:
        """Return the plain module in the type, on the device and in the mode of another."""
        own: Tensor = module.weight  # type: ignore[assignment]
        made = copy.deepcopy(self.plain).to(own.device, own.dtype).train(module.training)
        return made.requires_grad_(own.requires_grad)


def forward_weights(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: OutputPicker | None
) -> list[ForwardWeight]:
    """Find the modules that do one convolution or linear map with a weight that they compute.

    Each is run in float64 on what the model gives it, and on random numbers: the weight must not
    depend on them, and PyTorch's own module must give the same.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    asked = {path: m for path, m in modules.items() if path and _has_own_forward(m)}
    if not asked:
        return []
    seen: dict[str, tuple[Any, ...]] = {}
    with watched_inputs(asked, lambda path, _, given: seen.setdefault(path, given)):
        outputs_as_it_computes(model, args, kwargs, output)
    found = (_found(path, asked[path], given) for path, given in seen.items())
    return [one for one in found if one is not None]


def _has_own_forward(module: nn.Module) -> bool:
    base = next((c for c in _CLASSES.values() if isinstance(module, c)), None)
    own = base is not None and type(module).forward is not base.forward
    return own and not hasattr(module, "parametrizations")


def _found(path: str, module: nn.Module, given: tuple[Any, ...]) -> ForwardWeight | None:
    twin = copy_of(module).to(torch.float64)
    inputs = tree_map(widened, given)
    first, out = _watched(twin, inputs)
    if len(first.calls) != 1 or first.calls[0]["weight"] is twin.weight:
        return None  # no weight is computed
    one = first.calls[0]
    plain = _module(one)
    other = tree_map(lambda t: torch.randn_like(t) if isinstance(t, Tensor) else t, inputs)
    second, expected = _watched(twin, other)
    how = type(module).__name__
    if not torch.allclose(second.calls[0]["weight"], one["weight"], rtol=_SAME, atol=0.0):
        return ForwardWeight(path, how, plain, "its weight depends on its input")
    with torch.no_grad():
        alike = len(other) == 1 and all(
            t.shape == u.shape and torch.allclose(t, u, rtol=1e-10, atol=1e-10)
            for t, u in ((plain(inputs[0]), out), (plain(other[0]), expected))
        )
    reason = "" if alike else f"{how} does more than one linear map with the weight it computes"
    return ForwardWeight(path, how, plain, reason)


class _Watcher(TorchFunctionMode):
    """Notes the arguments of linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _CLASSES:
            named = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
            self.calls.append({"class": _CLASSES[func], **named})
        return func(*args, **(kwargs or {}))


def _watched(module: nn.Module, given: tuple[Any, ...]) -> tuple[_Watcher, Tensor]:
    try:
        with torch.no_grad(), plain_execution(), _Watcher() as watcher:
            return watcher, module(*given)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{type(module).__name__} does not run in float64 ({error})") from error


def _module(one: Mapping[str, Any]) -> nn.Module:
    """Return PyTorch's module for a call."""
    weight, bias = one["weight"], one.get("bias")
    made: nn.Module
    if one["class"] is nn.Linear:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    else:
        groups = one.get("groups", 1)
        options = {k: one[k] for k in ("stride", "padding", "dilation") if k in one}
        made = one["class"](
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), groups=groups,
            bias=bias is not None, **options,
        )  # fmt: skip
    values = {"weight": weight, **({} if bias is None else {"bias": bias})}
    for name, t in values.items():
        setattr(made, name, nn.Parameter(t.detach().clone()))
    return made
