"""Modes ``"hard"`` and ``"brake"``: the base steps, then vectors get their lengths back."""

import operator
from collections.abc import Sequence

from torch import Tensor

from onsphere.optim import kernels
from onsphere.optim.distributed import sharded_step
from onsphere.optim.steps.project import ConstrainedParameters, repeated, restore


class Restorer:
    """Restores lengths; a restoring that was made before is made again."""

    def __init__(self) -> None:
        self.calls: list[tuple[kernels.RepeatedRestore, list[ConstrainedParameters]]] = []
        self.known: list[ConstrainedParameters] = []  # what they restore

    def restore(
        self,
        constrained: Sequence[ConstrainedParameters],
        *,
        brake: bool,
        growth: float,
        sharded: bool,
    ) -> int | Tensor:
        """Bring weights back to their spheres; return how many vectors could not be.

        Args:
            constrained: vectors with recorded radii.
            brake: let vectors shrink, and brake their growth.
            growth: the share of its growth that a vector keeps under the brake.
            sharded: whether a parameter is spread over processes.
        """
        if sharded:
            return sharded_step.restore(constrained, brake=brake, growth=growth)
        calls = self.calls
        same = len(self.known) == len(constrained) and all(
            map(operator.is_, self.known, constrained)
        )
        if not same or not calls or not all(call.again() for call, _ in calls):
            self.known = list(constrained)
            self.calls = repeated(constrained)
            return restore(constrained, brake=brake, growth=growth)
        left = 0
        for call, many in calls:
            for held, count in zip(many, call.restore(brake=brake, growth=growth), strict=True):
                if count:
                    held.skipped.add_(count)
                    left += count
        return left
