"""Weights in half precision with a copy in float32 that is moved in their place.

Turns below the rounding of a weight get lost; the copy keeps them, and is rounded to the weight
after each step.
"""

from collections.abc import Iterable, MutableMapping

import torch
from torch import Tensor

from onsphere.optim.distributed import placement
from onsphere.optim.updates.geodesic import working_dtype
from onsphere.optim.updates.types import Group


def state_dtype(param: Tensor, group: Group) -> torch.dtype:
    """Return the precision of a parameter's moments: its own, or that of its copy in float32."""
    if group["master_weights"] and group["sphere"] is not None:
        return working_dtype(param)
    return param.dtype


def point_of(param: Tensor, group: Group, state: MutableMapping[Tensor, Group]) -> Tensor:
    """Return what a step moves: the parameter, or its copy in float32."""
    if not group["master_weights"]:
        return param
    own, dtype = state[param], state_dtype(param, group)
    if dtype == param.dtype:
        own.pop("master", None)  # after model.float()
        return param
    if "master" not in own:
        own["master"] = param.detach().to(dtype)
    master: Tensor = own["master"]
    return master


def gradient_of(param: Tensor, group: Group, *, sharded: bool) -> Tensor:
    """Return the gradient in the precision of what a step moves; of a shard that of the shard."""
    dtype = state_dtype(param, group)
    grad = param.grad if not sharded else placement.local_gradient(param)
    if grad is None:
        return torch.zeros_like(param, dtype=dtype)
    return grad if grad.dtype == dtype else grad.to(dtype)


def round_to_params(groups: Iterable[Group], state: MutableMapping[Tensor, Group]) -> None:
    """Write the copies in float32 to the parameters that they belong to."""
    pairs = [
        (p, state[p]["master"])
        for group in groups
        if group["master_weights"] and group["sphere"] is not None
        for p in group["params"]
        if "master" in state[p]
    ]
    for param, master in pairs:
        param.copy_(master)
