"""Norms that store their gain as an offset from 1: written so that families see the gain itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onsphere._torch.copies import copy_of

GAIN, SHIFT = "onsphere_gain", "onsphere_shift"


class _Gained(nn.Module):
    """A norm with its gain and shift outside.

    Args:
        norm: the norm; what it stored becomes 0.
        gain: one plus what it stored.
        shift: its shift, if it has one.
    """

    def __init__(self, norm: nn.Module, gain: Tensor, shift: Tensor | None) -> None:
        super().__init__()
        self.norm = norm
        self.onsphere_gain = nn.Parameter(gain)
        self.onsphere_shift = None if shift is None else nn.Parameter(shift)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the norm makes, times the gain."""
        made = self.norm(*args, **kwargs) * self.onsphere_gain
        return made if self.onsphere_shift is None else made + self.onsphere_shift


def offset_norms(model: nn.Module) -> list[str]:
    """Return the paths of modules that multiply by one plus what they store."""
    return [path for path, m in model.named_modules() if path and _is_offset(m)]


def with_gains_outside(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Return a copy in which such gains and shifts are parameters of their own."""
    twin = copy_of(model)
    for path in paths:
        norm = twin.get_submodule(path)
        gain = 1 + norm._parameters["weight"].detach()  # type: ignore[union-attr]
        bias = norm._parameters.get("bias")
        shift = None if bias is None else bias.detach().clone()
        with torch.no_grad():
            for p in norm.parameters():
                p.zero_()
        twin.set_submodule(path, _Gained(norm, gain, shift))
    return twin


def _is_offset(module: nn.Module) -> bool:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    known = 1 if bias is None else 2
    alone = len(list(module.parameters())) == known and not list(module.buffers())
    if weight is None or weight.ndim != 1 or not alone or len(weight) < 2:
        return False
    if type(module).__module__.startswith("torch.") or "norm" not in type(module).__name__.lower():
        return False
    x = torch.linspace(-1.0, 1.5, 3 * len(weight), dtype=weight.dtype, device=weight.device)
    x = x.reshape(3, -1)
    no_shift = {} if bias is None else {"bias": torch.zeros_like(bias)}

    def made(value: float) -> Tensor:
        replaced = {"weight": torch.full_like(weight, value), **no_shift}
        result: Tensor = torch.func.functional_call(module, replaced, (x,))
        return result

    try:
        with torch.no_grad():
            return bool(made(0.0).any()) and not bool(made(-1.0).any())
    except Exception:
        return False
