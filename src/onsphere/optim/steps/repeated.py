"""Steps that are made as the last one: what a group had then, and whether it still has it.

On small models most of a step would go by with finding state and describing calls, which are the
same from step to step. What is kept here is compared with what is there, piece by piece, before
every step; where anything differs, the step is made from the beginning.
"""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onsphere.optim import kernels
from onsphere.optim.updates.geodesic import StepOptions
from onsphere.optim.updates.per_coordinate import PerCoordinateUpdate
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.torch_optim import BaseStep
from onsphere.optim.updates.types import Group

# What a group must have had in the last step for this one to be made alike.
_SETTINGS = ("sphere", "lr_mode", "second_moment", "master_weights", "fused", "foreach")
_TENSORS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step", "radius", "vector_moment")


class Ready:
    """The parameters of a group and their state, as the last step had them."""

    def __init__(self, group: Group, state: Mapping[Tensor, Group]) -> None:
        self.params = list(group["params"])
        self._group = group
        self._settings = [group.get(name) for name in _SETTINGS]
        self._states = [state.get(param) for param in self.params]
        entries = [own for own in self._states if own is not None]
        held = [(own, key, own[key]) for own in entries for key in _TENSORS if key in own]
        self._owners = [own for own, _, _ in held]
        self._keys = [key for _, key, _ in held]
        self._held = [entry for _, _, entry in held]
        steps = self.column("step")
        self._counters = kernels.Counters(steps) if kernels.Counters.possible(steps) else None

    def column(self, key: str) -> list[Tensor]:
        """Return one entry of the state of all parameters; nothing where it is not in all."""
        found = [own[key] for own in self._states if own and isinstance(own.get(key), Tensor)]
        return found if len(found) == len(self.params) else []

    def fits(self, group: Group, state: Mapping[Tensor, Group]) -> bool:
        """Whether group, state and tensors are what they were."""
        params = group["params"]
        return (
            group is self._group
            and len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and all(map(operator.is_, map(group.get, _SETTINGS), self._settings))
            and all(map(operator.is_, map(state.get, params), self._states))
            and all(map(operator.is_, map(dict.get, self._owners, self._keys), self._held))
        )

    def count(self) -> float | None:
        """Count the step and return its number; ``None`` where parameters have made several."""
        return None if self._counters is None else self._counters.count()


class ReadyOnSpheres(Ready):
    """A call of the native kernels that was made for a group on spheres."""

    def __init__(self, call: kernels.Repeated, group: Group, state: Mapping[Tensor, Group]) -> None:
        super().__init__(group, state)
        self._call = call

    def fits(self, group: Group, state: Mapping[Tensor, Group]) -> bool:
        """Whether group, state and tensors are what they were."""
        return super().fits(group, state) and self._call.again()

    def step(
        self, update: PerVectorUpdate | PerCoordinateUpdate, options: StepOptions | BaseStep
    ) -> list[int]:
        """Take the step; return how many vectors of each parameter stayed where they were."""
        return self._call.step(update, options)

    def finite(self) -> bool:
        """Whether all squares of the gradients that were noted are finite."""
        return self._call.finite()

    @property
    def unsure(self) -> list[int]:
        """How many vectors of each parameter are to be restored after a step."""
        return self._call.unsure


class ReadyInSpace(Ready):
    """Ordinary parameters that PyTorch's fused step on the CPU moves.

    Args:
        group: whose parameters all have a gradient that :func:`~onsphere.optim.steps.fused.fusable`
            takes.
        state: of the optimizer.
        keys: the entries of the state that the step moves.
    """

    def __init__(self, group: Group, state: Mapping[Tensor, Group], keys: Sequence[str]) -> None:
        super().__init__(group, state)
        self.columns = [self.column(key) for key in keys]
        self.steps = self.column("step")
        self._kinds = kernels.Kinds(self.params)
        self._kinds_of_grads = kernels.Kinds(self.params)
        self._places = kernels.Places([*self.params, *(x for xs in self.columns for x in xs)])
        self._grads: list[Tensor] = []

    @property
    def possible(self) -> bool:
        """Whether everything is of the kind that the fused step walks through."""
        params = self.params
        return (
            bool(params)
            and all(type(p) in (Tensor, torch.nn.Parameter) and p.is_cpu for p in params)
            and len({p.dtype for p in params}) == 1
            and all(self._kinds.fit(column) for column in self.columns)
        )

    def fits(self, group: Group, state: Mapping[Tensor, Group]) -> bool:
        """Whether group, state and tensors are what they were; note the gradients."""
        self._grads = [grad for p in self.params if (grad := p.grad) is not None]
        return (
            super().fits(group, state)
            and kernels.allowed()
            and not torch.compiler.is_compiling()
            and self._places.unchanged()
            and self._kinds.fit(self.params)
            and self._kinds_of_grads.fit(self._grads)
        )

    def take_grads(self) -> list[Tensor]:
        """Hand out the gradients that were noted; they are not kept beyond the step."""
        grads, self._grads = self._grads, []
        return grads

    def count_all(self) -> None:
        """Count the step, of whatever number it is for each of the parameters."""
        if self.count() is None:
            torch._foreach_add_(self.steps, 1.0)
