"""Weights that are computed from others: by weight norm, spectral norm, masks of pruning."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from onsphere._torch.copies import copy_of

_OLD = {"WeightNorm": remove_weight_norm, "SpectralNorm": remove_spectral_norm}


@dataclass(frozen=True)
class Computed:
    """A weight that a module computes.

    Args:
        path: of the module.
        name: of the weight in it.
        how: the class that computes it.
        hook: whether a hook before ``forward`` does (the older way).
        pruned: whether that hook only multiplies by a mask.
    """

    path: str
    name: str
    how: str
    hook: bool
    pruned: bool = False

    @property
    def weight(self) -> str:
        """The full name of the weight."""
        return f"{self.path}.{self.name}" if self.path else self.name


def computed_weights(model: nn.Module) -> Iterator[Computed]:
    """Yield the weights that modules compute from others, pruned ones first.

    Of a pruned one another may be computed in turn.
    """
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                yield Computed(path, hook._tensor_name, type(hook).__name__, True, True)
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name, steps in module.parametrizations.items():
                how = " after ".join(_name(s) for s in reversed(list(steps)))
                yield Computed(path, name, how, False)
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ in _OLD and isinstance(getattr(hook, "name", None), str):
                yield Computed(path, hook.name, type(hook).__name__, True)


def _name(step: nn.Module) -> str:
    method = getattr(step, "method", None)
    return str(getattr(method, "name", None) or type(step).__name__.lstrip("_"))


def in_float64(model: nn.Module, one: Computed) -> Tensor:
    """Return a computed weight, computed in float64."""
    module = copy_of(model.get_submodule(one.path)).to(torch.float64)
    with torch.no_grad():
        for inner in [c for c in computed_weights(module) if c.pruned]:
            _made_plain(module.get_submodule(inner.path), inner)
        if one.hook and not one.pruned:
            _made_plain(module, one)
        weight: Tensor = getattr(module, one.name)
        return weight.detach().clone()


def make_plain(model: nn.Module, one: Computed) -> None:
    """Put a plain weight in the place of a computed one."""
    with torch.no_grad():
        _made_plain(model.get_submodule(one.path), one)


def _made_plain(module: nn.Module, one: Computed) -> None:
    if one.pruned:
        prune.remove(module, one.name)  # type: ignore[no-untyped-call]
    elif one.hook:
        wants = any(p.requires_grad for p in module.parameters(recurse=False))
        _OLD[one.how](module, one.name)
        if one.name not in module._parameters:
            weight: Tensor = vars(module).pop(one.name)
            module.register_parameter(one.name, nn.Parameter(weight.detach().clone(), wants))
    elif parametrize.is_parametrized(module):  # not done yet for another weight of the module
        _without_parametrizations(module)


def _without_parametrizations(module: nn.Module) -> None:
    """Make all computed weights of a module plain.

    ``remove_parametrizations`` changes the class, which copies of a module share.
    """
    steps: Any = module.parametrizations
    weights = {
        name: (getattr(module, name).detach().clone(), any(p.requires_grad for p in s.parameters()))
        for name, s in steps.items()
    }
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, (weight, wants) in weights.items():
        module.register_parameter(name, nn.Parameter(weight, wants))
