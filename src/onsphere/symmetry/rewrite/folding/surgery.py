"""Changes of a model itself: values, biases that were not there, modules that are not needed."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from onsphere.symmetry.rewrite.folding.linear_maps import LinearMap

_PLAIN_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def is_plain_norm(module: nn.Module) -> bool:
    """Return whether a norm does nothing else: some bring an activation along."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    named = type(module) in _PLAIN_NORMS or type(module).__name__ == "FrozenBatchNorm2d"
    return named and not hooks


def add_bias(model: nn.Module, one: LinearMap) -> None:
    """Give a map a bias of zeros."""
    module = model.get_submodule(one.path)
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias = torch.zeros(one.outputs, dtype=weight.dtype, device=weight.device)
    module.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def write(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write values into weights and buffers, by name."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, t in state.items():
            if name in own:
                own[name].copy_(t)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another, wherever that stands."""
    gone = model.get_submodule(path)
    if gone is model:
        return
    for owner in model.modules():
        for name, child in owner._modules.items():
            if child is gone:
                owner._modules[name] = module.train(gone.training)
