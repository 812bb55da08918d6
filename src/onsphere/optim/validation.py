"""What cannot live on a sphere, or not move there, and what is said of it."""

import inspect
import sys
import warnings
from collections.abc import Iterable, Sequence

import torch
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


def refuse_sparse(grads: Iterable[Tensor], name: str) -> None:
    """Raise for a gradient that is not dense."""
    for grad in grads:
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{name} needs a dense gradient for weights on a sphere, got layout "
                f"{grad.layout}; make the layer dense (sparse=False) or leave it out of the "
                "groups with a sphere"
            )


def immovable(params: Sequence[Tensor], sphere: Sphere) -> str:
    """Return what is to be said of parameters whose vectors can never move; mostly nothing."""
    vectors = sphere.axes.count(params[0].shape)
    if not vectors or sum(param.numel() for param in params) != vectors:
        return ""
    return (
        f"a parameter of shape {tuple(params[0].shape)} is on a sphere whose vectors have one "
        "entry each: they have no direction to turn to and never move. Leave it out of the "
        "groups with a sphere, make one vector of it (Sphere()), or put it on a joint sphere with "
        "its weight"
    )


def lost_in(dtype: torch.dtype, rotation: float | Tensor) -> bool:
    """Whether turns by an angle get lost in the rounding of weights.

    Half of the spacing of numbers near 1 is where the turn of a random vector begins to fall
    short: 3% there, 80% at a tenth of it.

    Example:
        >>> lost_in(torch.bfloat16, 1e-3), lost_in(torch.float16, 1e-3)
        (True, False)
    """
    return dtype.itemsize < 4 and 0 < float(rotation) < torch.finfo(dtype).eps / 2


def warn_of_rounding(
    dtype: torch.dtype, rotation: float | Tensor, mend_by: str, stacklevel: int
) -> None:
    """Say that turns are smaller than rounding."""
    warnings.warn(
        f"weights in {dtype} that turn by {float(rotation):.2g} radians per step: that "
        f"is below their rounding ({torch.finfo(dtype).eps / 2:.2g}), in which turns get lost. "
        f"Give {mend_by}, or weights in float32",
        UserWarning,
        stacklevel=stacklevel + 1,
    )


def warn_of_decay(decay: float, stacklevel: int, *, ignored: bool = False) -> None:
    """Say that weight decay does nothing on a sphere; whether the optimizer leaves it out."""
    there = "; it is ignored there" if ignored else ""
    warnings.warn(
        f"weight_decay={decay} does nothing to weights on a sphere: it points along the radius, "
        f"which is fixed{there}. Give those groups weight_decay=0",
        UserWarning,
        stacklevel=stacklevel + 1,
    )


def warn_of_skips(who: str, left: int, why: str, stacklevel: int) -> None:
    """Say that an optimizer left vectors where they were, and why it may have been."""
    warnings.warn(
        f"{who} left {left} vectors where they were: they are zero and have no direction (give "
        f"them a start that is not 0, or leave them off spheres), or their {why}. The running "
        "count is optimizer.skipped; this is said once",
        UserWarning,
        stacklevel=stacklevel + 1,
    )


def say_once(words: str, stacklevel: int) -> str:
    """Warn where there is something to say; return what is left to be said."""
    if words:
        warnings.warn(words, UserWarning, stacklevel=stacklevel + 1)
    return ""
