"""What optimizers on spheres warn of, once each: options and weights without effect."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from onsphere.geometry import Sphere


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


def without_sphere(name: str, base: str) -> str:
    """Return what is to be said of an optimizer whose groups say nothing of spheres."""
    return (
        f"{name} was given no sphere in any param group, so it is {base} and nothing else. Give "
        "it the groups of an audit, onsphere.audit(model, inputs).param_groups(model), or name "
        "weights by hand: {'params': [weight], 'sphere': onsphere.geometry.Sphere()}"
    )


def say_once(words: str, stacklevel: int) -> str:
    """Warn where there is something to say; return what is left to be said."""
    if words:
        warnings.warn(words, UserWarning, stacklevel=stacklevel + 1)
    return ""


def warn_of_decay(decay: float, consequence: str, stacklevel: int) -> None:
    """Say that weight decay has no effect on a sphere, and what becomes of it."""
    warnings.warn(
        f"weight_decay={decay} does nothing to weights on a sphere: it points along the radius, "
        f"which is fixed{consequence}. Give those groups weight_decay=0",
        UserWarning,
        stacklevel=stacklevel + 1,
    )


def warn_of_skips(name: str, left: int, gradient: str, stacklevel: int) -> None:
    """Say that vectors were left where they were: zero, or of such a gradient."""
    warnings.warn(
        f"{name} left {left} vectors where they were: they are zero and have no direction (give "
        "them a start that is not 0, or leave them off spheres), or their gradient is "
        f"{gradient}. The running count is optimizer.skipped; this is said once",
        UserWarning,
        stacklevel=stacklevel + 1,
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
