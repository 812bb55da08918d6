"""What one step is made of: tensors with their gradients and state, and which belong together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onsphere.geometry import Sphere
from onsphere.optim.updates.geodesic import StepOptions
from onsphere.optim.updates.per_coordinate import PerCoordinateUpdate
from onsphere.optim.updates.per_vector import PerVectorUpdate

Group = dict[str, Any]
"""A param group of an optimizer, or the state of one parameter."""


def rate_of(group: Mapping[str, Any]) -> Any:
    r"""Return the rate of a group: its ``lr``, or the rotation that a recipe makes of it.

    A tuned run turns by :math:`c\sqrt\eta` per step, where :math:`c` depends on its decay and
    momentum. A group with ``rotation_scale`` :math:`c` keeps the tuned rate :math:`\eta` as its
    ``lr``, so that any scheduler does to it what it does to the tuned run.

    Args:
        group: a param group.

    Returns:
        Radians per step where there is a ``rotation_scale``; else ``lr`` as it is.

    Raises:
        ValueError: there is a ``rotation_scale``, and ``lr`` is negative (a number, or a tensor on
            the CPU).

    Example:
        >>> rate_of({"lr": 0.25}), rate_of({"lr": 0.25, "rotation_scale": 0.1})
        (0.25, 0.05)
    """
    scale, lr = group.get("rotation_scale"), group["lr"]
    if scale is None or lr is None:
        return lr
    if (not isinstance(lr, Tensor) or lr.device.type == "cpu") and lr < 0:
        raise ValueError(
            f"lr must be at least 0, got {float(lr):g}: a group of a recipe turns by the root of "
            "its lr. See what the scheduler, or the code, has set it to"
        )
    return scale * lr**0.5


@dataclass
class Part:
    """One tensor in a step.

    Attributes:
        point: the weight, moved in place.
        slope: its gradient, never changed.
        momentum: moved along in place; ``None`` for an update without.
        moment: second moment per coordinate, where the update has one.
        update: what is done to each vector.
    """

    point: Tensor
    slope: Tensor
    momentum: Tensor | None
    moment: Tensor | None
    update: PerVectorUpdate | PerCoordinateUpdate


@dataclass
class Family:
    """Parts whose vectors belong together, and what these vectors own.

    Attributes:
        parts: one tensor, or several that share their spheres.
        radius: one number per vector, 0 for those not seen yet; recorded in place.
        moment: second moment per vector, where the update has one.
        reference: the reference length of a relative rate.
    """

    parts: list[Part]
    radius: Tensor
    moment: Tensor | None = None
    reference: float = 1.0


StepBatch = tuple[Sequence[Family], Sphere, StepOptions]
