"""Norms that store their gain as an offset from 1: written so that families see the gain itself."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

GAIN = "onsphere_gain"


class _Gained(nn.Module):
    """A norm with its gain outside.

    Args:
        norm: the norm; what it stores becomes 0.
        gain: one plus what it stored.
    """

    def __init__(self, norm: nn.Module, gain: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.onsphere_gain = nn.Parameter(gain)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the norm makes, times the gain."""
        return self.norm(*args, **kwargs) * self.onsphere_gain


def offset_norms(model: nn.Module) -> dict[str, str]:
    """Return modules that multiply by one plus what they store, with the name of that."""
    return {path: f"{path}.weight" for path, m in model.named_modules() if path and _is_offset(m)}


def with_gains_outside(model: nn.Module) -> nn.Module:
    """Return a copy in which such gains are parameters of their own."""
    paths = offset_norms(model)
    twin = copy.deepcopy(model)
    for path in paths:
        norm = twin.get_submodule(path)
        weight: Tensor = norm.weight  # type: ignore[assignment]
        gain = 1 + weight.detach()
        with torch.no_grad():
            weight.zero_()
        twin.set_submodule(path, _Gained(norm, gain))
    return twin


def _is_offset(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    alone = len(list(module.parameters())) == 1 and not list(module.buffers())
    if weight is None or weight.ndim != 1 or not alone or len(weight) < 2:
        return False
    if type(module).__module__.startswith("torch.") or "norm" not in type(module).__name__.lower():
        return False
    x = torch.linspace(-1.0, 1.5, 3 * len(weight), dtype=weight.dtype, device=weight.device)
    x = x.reshape(3, -1)

    def made(value: float) -> Tensor:
        replaced = {"weight": torch.full_like(weight, value)}
        result: Tensor = torch.func.functional_call(module, replaced, (x,))
        return result

    try:
        with torch.no_grad():
            return bool(made(0.0).any()) and not bool(made(-1.0).any())
    except Exception:
        return False
