r"""Modes ``"hard"`` and ``"rotate"`` of PyTorch's own AdamW, Adam and SGD, in one pass over memory.

What these optimizers do is known: with their moments, which stay where they are, a native kernel
makes the same step and brings vectors to their spheres before it goes on to the next ones. The
numbers are those of the general way (the base steps, then lengths are restored), to rounding.

It is taken by parameters, where all is plain: of exactly these classes and options, in float32 on
the CPU, with state from an earlier step. What is left over goes the general way in the same step.
Which way a parameter goes depends on what a checkpoint holds, and on nothing else of the past: a
resumed run takes the same ways.
"""

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from onsphere.geometry import Sphere
from onsphere.optim import kernels
from onsphere.optim.steps.fused import plain_numbers
from onsphere.optim.steps.project import ConstrainedParameters, restore
from onsphere.optim.steps.repeated import ReadyOnSpheres
from onsphere.optim.updates.per_coordinate import PerCoordinateUpdate
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.torch_optim import BaseMode, BaseStep, adamw_update, sgd_update
from onsphere.optim.updates.types import Family, Group, Part, rate_of

_ADAMS = (torch.optim.Adam, torch.optim.AdamW)
# Gradients that are looked at before their step begins: the cache holds them until they are used.
_ENTRIES = 1 << 21
# Below it the kernel's least root of a second moment would count beside eps.
_LEAST_EPS = 1e-10
_State = Mapping[Tensor, Group]


def knows(base: Optimizer) -> bool:
    """Whether the steps of an optimizer are known: one of PyTorch's own that nothing watches.

    Example:
        >>> knows(torch.optim.SGD([torch.ones(1)])), knows(torch.optim.NAdam([torch.ones(1)]))
        (True, False)
    """
    return (
        type(base) in (*_ADAMS, torch.optim.SGD)
        and "step" not in vars(base)
        and not base._optimizer_step_pre_hooks
        and not base._optimizer_step_post_hooks
        and getattr(base, "grad_scale", None) is None
        and getattr(base, "found_inf", None) is None
    )


def _keys(base: Optimizer, group: Group) -> tuple[str, ...]:
    """Name the moments that a step moves."""
    if type(base) in _ADAMS:
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if group["momentum"] else ()


def _step_of(base: Optimizer, group: Group, mode: BaseMode) -> BaseStep | None:
    """Return what a step of a group does to its vectors; ``None`` where the kernels cannot."""
    lr, decay = group["lr"], group["weight_decay"]
    if group.get("differentiable") or not plain_numbers(lr, decay):
        return None
    coupled = False
    if type(base) in _ADAMS:
        plain = plain_numbers(*group["betas"], group["eps"]) and group["eps"] >= _LEAST_EPS
        if not plain or group["amsgrad"] or group["capturable"]:
            return None
        coupled = not group.get("decoupled_weight_decay", type(base) is torch.optim.AdamW)
    elif not plain_numbers(group["momentum"], group["dampening"]):
        return None
    if mode == "rotate":  # the base would step from zero, which does not decay
        return BaseStep(float(rate_of(group)), mode, 0.0, group["maximize"])
    if coupled and decay:
        return None  # it goes into the moments
    return BaseStep(float(lr), mode, float(decay), group["maximize"])


class _Batch:
    """Parameters of one group that make their steps together.

    Args:
        group: of the base optimizer.
        held: parameters, with their radii.
        families: the same as the kernels take them.
        state: of the base optimizer.
    """

    def __init__(
        self,
        group: Group,
        held: list[ConstrainedParameters],
        families: list[Family],
        state: _State,
    ) -> None:
        self.group, self.held = group, held
        self._own: Group = {"params": [one.params[0] for one in held]}
        call = kernels.Repeated(families, held[0].sphere)
        self._ready = ReadyOnSpheres(call, self._own, state)
        self._look = kernels.finite_of(self.grads)

    @property
    def params(self) -> list[Tensor]:
        """The parameters."""
        params: list[Tensor] = self._own["params"]
        return params

    @property
    def grads(self) -> list[Tensor]:
        """Their gradients."""
        return [p.grad for p in self.params if p.grad is not None]

    def fits(self, state: _State) -> bool:
        """Whether state and tensors are what they were; note where the gradients lie."""
        return self._ready.fits(self._own, state)

    def finite(self) -> bool:
        """Whether all squares of the gradients are finite."""
        return self._look is not None and bool(self._look(self.grads))

    def update(self, base: Optimizer) -> PerVectorUpdate | PerCoordinateUpdate | None:
        """Count the step and return its update; ``None``, with nothing counted, of several."""
        group = self.group
        if type(base) in _ADAMS:
            betas, steps = group["betas"], self._ready.count()
            if steps is None:
                return None
            return adamw_update(
                betas=betas, eps=group["eps"], steps=steps, second_moment="coordinate"
            )
        return sgd_update(
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            first=False,
        )

    def step(self, update: PerVectorUpdate | PerCoordinateUpdate, options: BaseStep) -> int:
        """Take the step; return how many vectors stayed where they were."""
        left = 0
        for held, count in zip(self.held, self._ready.step(update, options), strict=True):
            if count:
                held.skipped.add_(count)
                left += count
        if any(self._ready.unsure):  # the update has cancelled most of a vector
            counts = zip(self.held, self._ready.unsure, strict=True)
            left += int(restore([held for held, count in counts if count]))
        return left


class _Seen(NamedTuple):
    """What the batches were made for."""

    constrained: list[ConstrainedParameters]
    asked: list[bool]
    groups: list[tuple[Group, list[Tensor]]]

    def fits(
        self, constrained: Sequence[ConstrainedParameters], asked: list[bool], groups: list[Group]
    ) -> bool:
        return (
            asked == self.asked
            and len(groups) == len(self.groups)
            and all(map(operator.is_, constrained, self.constrained))
            and all(
                group is mine
                and len(group["params"]) == len(params)
                and all(map(operator.is_, group["params"], params))
                for group, (mine, params) in zip(groups, self.groups, strict=True)
            )
        )


class OnePass:
    """Makes the steps of an optimizer of PyTorch where they are known, as far as they are."""

    def __init__(self) -> None:
        self._seen = _Seen([], [], [])
        self._batches: list[_Batch] = []
        # What has a gradient and may be taken as soon as it has state and radii.
        self._later: list[tuple[Group, ConstrainedParameters]] = []

    def step(
        self,
        base: Optimizer,
        constrained: Sequence[ConstrainedParameters],
        *,
        mode: BaseMode,
        look: bool,
        before_turning: Callable[[torch.dtype, float], None],
    ) -> tuple[list[ConstrainedParameters], int]:
        """Move what can be moved; return this, and how many of its vectors stayed.

        Args:
            base: an optimizer that is known.
            constrained: parameters on spheres, in one process; those with a gradient move.
            mode: of the wrapper.
            look: whether parameters whose gradients are not finite are to be left over.
            before_turning: told the precision of a weight, and by how much it turns.
        """
        if not kernels.usable():
            return [], 0
        self._prepare(base, constrained)
        moved: list[ConstrainedParameters] = []
        left = 0
        for batch in self._batches:
            options = _step_of(base, batch.group, mode)
            if options is None or (look and not batch.finite()):
                continue
            if mode == "rotate":
                before_turning(torch.float32, options.lr)
            update = batch.update(base)
            if update is not None:
                left += batch.step(update, options)
                moved += batch.held
        return moved, left

    def _prepare(self, base: Optimizer, constrained: Sequence[ConstrainedParameters]) -> None:
        asked = [held.params[0].grad is not None for held in constrained]
        if (
            self._seen.fits(constrained, asked, base.param_groups)
            and all(batch.fits(base.state) for batch in self._batches)
            and not any(_takes(base, *later) for later in self._later)
        ):
            return
        groups = [(group, list(group["params"])) for group in base.param_groups]
        self._seen = _Seen(list(constrained), asked, groups)
        owner = {param: group for group, params in groups for param in params}
        candidates = [
            (owner[held.params[0]], held)
            for held, moves in zip(constrained, asked, strict=True)
            if moves and held.params[0] in owner and not held.sphere.joint
        ]
        taken = [_takes(base, *one) for one in candidates]
        made = _batches(base, itertools.compress(candidates, taken))
        self._batches = [batch for batch in made if batch.fits(base.state)]
        self._later = [one for one, now in zip(candidates, taken, strict=True) if not now]


def _takes(base: Optimizer, group: Group, held: ConstrainedParameters) -> bool:
    """Whether the kernels take a parameter with its gradient and state, as they are now."""
    param = held.params[0]
    if param.dtype != torch.float32 or not param.is_cpu or param.grad is None:
        return False
    state = base.state.get(param, {})
    moments = [state.get(key) for key in _keys(base, group)]
    if not all(isinstance(x, Tensor) and x.shape == param.shape for x in moments):
        return False
    if type(base) in _ADAMS and not _counts(state.get("step")):
        return False
    if not bool((held.radius != 0).all()):
        return False
    return kernels.Repeated.possible([_family(base, group, held)], held.sphere) and (
        param.grad.shape == param.shape and param.grad.stride() == param.stride()
    )


def _counts(step: Any) -> bool:
    return isinstance(step, Tensor) and kernels.Counters.possible([step])


def _family(base: Optimizer, group: Group, held: ConstrainedParameters) -> Family:
    param = held.params[0]
    moments = [base.state[param][key] for key in _keys(base, group)]
    first, second = (*moments, None, None)[:2]
    assert param.grad is not None
    # What the update is changes from step to step; a description of the call has no place for it.
    update = sgd_update(momentum=0.0, dampening=0.0, nesterov=False, first=False)
    return Family([Part(param, param.grad, first, second, update)], held.radius)


def _batches(
    base: Optimizer, taken: Iterator[tuple[Group, ConstrainedParameters]]
) -> Iterator[_Batch]:
    """Cut what is alike into calls, of as many entries as a cache may hold."""
    alike: dict[tuple[int, Sphere, float], list[tuple[Group, ConstrainedParameters]]] = {}
    for group, held in taken:
        steps = base.state.get(held.params[0], {}).get("step", 0.0)
        alike.setdefault((id(group), held.sphere, float(steps)), []).append((group, held))
    for many in alike.values():
        first, entries = 0, 0
        for number, (group, held) in enumerate(many):
            entries += held.params[0].numel()
            if entries >= _ENTRIES or number + 1 == len(many):
                own = [one for _, one in many[first : number + 1]]
                families = [_family(base, group, one) for one in own]
                yield _Batch(group, own, families, base.state)
                first, entries = number + 1, 0


@contextmanager
def without_gradients(params: Sequence[Tensor]) -> Iterator[None]:
    """Take gradients away for a while: an optimizer passes over parameters without one."""
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
