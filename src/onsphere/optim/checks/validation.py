"""What cannot live on a sphere, and options that a sphere optimizer cannot follow."""

import inspect
import sys
from collections.abc import Sequence

from torch import Tensor

from onsphere.geometry import Sphere
from onsphere.optim.distributed import placement


def check_sphere(params: Sequence[Tensor], sphere: object) -> None:
    """Raise unless these parameters can live on that sphere."""
    if not isinstance(sphere, Sphere):
        raise TypeError(
            f"a group's `sphere` is an onsphere.geometry.Sphere or None, got {sphere!r}"
        )
    if sphere.joint:
        _check_not_dealt_out()
    counts = set()
    for position, param in enumerate(params):
        if not param.is_floating_point():
            raise ValueError(
                f"parameter {position} of the group has dtype {param.dtype}; weights on a sphere "
                "are real floating point (for complex ones use torch.view_as_real)"
            )
        if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                f"parameter {position} of the group is flattened by FullyShardedDataParallel "
                "(FSDP1): which of its entries form a vector is lost. Use fully_shard (FSDP2), "
                "which keeps the shapes, or leave it off spheres"
            )
        try:
            counts.add(sphere.axes.count(param.shape))
        except ValueError as error:
            raise ValueError(f"parameter {position} of the group: {error}") from None
    if placement.any_in(params):
        placement.check(params, sphere)
    if sphere.joint and len(counts) > 1:
        raise ValueError(
            "the parameters of a joint sphere must have the same number of vectors, got "
            f"{sorted(counts)}; give each joint sphere a param group of its own"
        )


def _check_not_dealt_out() -> None:
    """Raise where ZeroRedundancyOptimizer deals the parameters of joint spheres out to processes.

    It makes an optimizer in each process of those of a group that fall to it, and only it knows
    the whole groups. Every process raises, so that none waits for another.
    """
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = inspect.currentframe() if zero else None
    while zero and frame:
        caller = frame.f_locals.get("self")
        if isinstance(caller, zero.ZeroRedundancyOptimizer) and caller.world_size > 1:
            spheres = [(g.get("sphere"), len(g["params"])) for g in caller.param_groups]
            if any(sphere is not None and sphere.joint and n > 1 for sphere, n in spheres):
                raise ValueError(
                    "ZeroRedundancyOptimizer gives the parameters of a joint sphere to different "
                    "processes, which then hold parts of its vectors. Let it make the base and "
                    "wrap it: on_sphere(ZeroRedundancyOptimizer(params, torch.optim.AdamW, ...), "
                    "{(weight, bias): Sphere(joint=True)})"
                )
        frame = frame.f_back


def check_options(
    name: str, *, foreach: bool | None, fused: bool | None, differentiable: bool
) -> None:
    """Raise for options of PyTorch's optimizers that a sphere optimizer cannot follow."""
    if foreach and fused:
        raise ValueError("foreach and fused cannot both be True, as in torch.optim")
    if differentiable:
        raise ValueError(
            f"{name} does not take differentiable=True: its kernels write weights in place, "
            "without a derivative"
        )
