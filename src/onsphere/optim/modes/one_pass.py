r"""Modes ``"hard"`` and ``"rotate"`` of PyTorch's own AdamW, Adam and SGD, in one pass over memory.

What these optimizers do is known: with their moments, which stay where they are, a native kernel
makes the same step and brings vectors to their spheres before it goes on to the next ones. The
numbers are those of the general way (the base steps, then lengths are restored), to rounding.

It is taken by parameters, where all is plain: of exactly these classes and options, in float32 on
the CPU, with state from an earlier step. Ordinary parameters of a fused optimizer are moved by the
same operator of PyTorch as the optimizer's own step calls, and everything that is left over goes
the general way in the same step.
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
from onsphere.optim.checks.gradients import refuse_sparse
from onsphere.optim.steps.fused import fusable, plain_numbers
from onsphere.optim.steps.ordinary import adamw_again, moved_fused, sgd_again
from onsphere.optim.steps.project import ConstrainedParameters, restore
from onsphere.optim.steps.repeated import ReadyInSpace, ReadyOnSpheres
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
    if mode == "rotate" and group.get("momentum"):
        return None  # where gradient and momentum cancel, inner products do not tell what is left
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

    def fits(self, state: _State) -> bool:
        """Whether state and tensors are what they were; note where the gradients lie."""
        return self._ready.fits(self._own, state)

    def finite(self) -> bool:
        """Whether all squares of the gradients are finite."""
        return self._ready.finite()

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


class _Ordinary:
    """Ordinary parameters of one group, which PyTorch's fused step moves.

    Args:
        base: an optimizer that is known.
        group: one of its groups.
        params: those that are not on spheres and have a gradient.
    """

    def __init__(self, base: Optimizer, group: Group, params: list[Tensor]) -> None:
        self.params, self._group = params, group
        self._own: Group = {"params": params}
        self._adam = type(base) in _ADAMS
        self._ready = ReadyInSpace(self._own, base.state, _keys(base, group))
        grads = [p.grad for p in params if p.grad is not None]
        self.possible = (
            len(self._ready.columns) == len(_keys(base, group))
            and all(self._ready.columns)
            and self._ready.possible
            and all(map(moved_fused, params))
            and fusable(params, grads, *self._ready.columns)
        )

    def fits(self, state: _State) -> bool:
        """Whether state and tensors are what they were; note the gradients."""
        return self._ready.fits(self._own, state)

    def step(self) -> bool:
        """Take the step; return whether it could be taken."""
        group = self._group
        if not group["fused"] or group["differentiable"] or group.get("capturable"):
            return False
        if not self._adam:
            return sgd_again(self._ready, group)
        if group["amsgrad"]:
            return False
        return adamw_again(self._ready, group, decoupled=group["decoupled_weight_decay"])


class _Seen(NamedTuple):
    """What a step was prepared for."""

    constrained: list[ConstrainedParameters]
    groups: list[Group]
    params: list[Tensor]
    asked: list[bool]
    moments: list[tuple[str, ...]]

    def fits(
        self,
        constrained: Sequence[ConstrainedParameters],
        groups: list[Group],
        moments: list[tuple[str, ...]],
    ) -> bool:
        """Whether these are the same, with gradients where there were some."""
        params = [param for group in groups for param in group["params"]]
        return (
            len(constrained) == len(self.constrained)
            and len(groups) == len(self.groups)
            and len(params) == len(self.params)
            and all(map(operator.is_, constrained, self.constrained))
            and all(map(operator.is_, groups, self.groups))
            and all(map(operator.is_, params, self.params))
            and [param.grad is not None for param in params] == self.asked
            and moments == self.moments
        )


_NOTHING = _Seen([], [], [], [], [])


class Moved(NamedTuple):
    """What a step has moved.

    Attributes:
        held: on spheres.
        params: all parameters, ordinary ones too.
        left: how many vectors stayed where they were.
        everything: whether nothing is left over.
    """

    held: list[ConstrainedParameters]
    params: list[Tensor]
    left: int
    everything: bool


class OnePass:
    """Makes the steps of an optimizer of PyTorch where they are known, as far as they are."""

    def __init__(self) -> None:
        self._seen = _NOTHING
        self._batches: list[_Batch] = []
        self._ordinary: list[_Ordinary] = []
        # On spheres, but in no batch; and what of it may be as soon as it has state and radii.
        self._rest: list[ConstrainedParameters] = []
        self._later: list[tuple[Group, ConstrainedParameters]] = []

    def step(
        self,
        base: Optimizer,
        constrained: Sequence[ConstrainedParameters],
        *,
        mode: BaseMode,
        look: bool,
        before_turning: Callable[[torch.dtype, float], None],
    ) -> Moved:
        """Move what can be moved.

        Args:
            base: an optimizer that is known.
            constrained: parameters on spheres, in one process; those with a gradient move.
            mode: of the wrapper.
            look: whether parameters whose gradients are not finite are to be left over.
            before_turning: told the precision of a weight, and by how much it turns.

        Raises:
            RuntimeError: a parameter on a sphere has a sparse gradient; nothing has moved.
        """
        if not kernels.usable():
            return Moved([], [], 0, everything=False)
        self._prepare(base, constrained)
        refuse_sparse(_gradients(self._rest), "on_sphere")
        asked = sum(self._seen.asked)
        held: list[ConstrainedParameters] = []
        left = 0
        for batch in self._batches:
            options = _step_of(base, batch.group, mode)
            if options is None or (look and not batch.finite()):
                continue
            if mode == "rotate":
                before_turning(torch.float32, options.lr)
            update = batch.update(base)
            if update is None:
                self._seen = _NOTHING  # counters that were alike are not: to be cut anew
                continue
            left += batch.step(update, options)
            held += batch.held
        params = [one.params[0] for one in held]
        for ordinary in self._ordinary:
            if ordinary.step():
                params += ordinary.params
        everything = len(held) == len(constrained) and len(params) == asked
        return Moved(held, params, left, everything)

    def _prepare(self, base: Optimizer, constrained: Sequence[ConstrainedParameters]) -> None:
        moments = [_keys(base, group) for group in base.param_groups]  # SGD's come and go
        if (
            self._seen.fits(constrained, base.param_groups, moments)
            and all(batch.fits(base.state) for batch in self._batches)
            and all(ordinary.fits(base.state) for ordinary in self._ordinary)
            and not any(_takes(base, *later) for later in self._later)
        ):
            return
        groups = base.param_groups
        params = [param for group in groups for param in group["params"]]
        asked = [param.grad is not None for param in params]
        self._seen = _Seen(list(constrained), list(groups), params, asked, moments)
        owner = {param: group for group in groups for param in group["params"]}
        candidates = [
            (owner[held.params[0]], held)
            for held in constrained
            if not held.sphere.joint and held.params[0] in owner and held.params[0].grad is not None
        ]
        taken = [_takes(base, *one) for one in candidates]
        self._later = [one for one, now in zip(candidates, taken, strict=True) if not now]
        made = _batches(base, itertools.compress(candidates, taken))
        self._batches = [batch for batch in made if batch.fits(base.state)]
        inside = {id(held) for batch in self._batches for held in batch.held}
        self._rest = [held for held in constrained if id(held) not in inside]
        self._ordinary = list(_ordinary(base, constrained))


def _ordinary(base: Optimizer, constrained: Sequence[ConstrainedParameters]) -> Iterator[_Ordinary]:
    """Yield what the fused steps of groups move besides."""
    on_spheres = {param for held in constrained for param in held.params}
    for group in base.param_groups:
        params = [p for p in group["params"] if p.grad is not None and p not in on_spheres]
        if group["fused"] and params:
            found = _Ordinary(base, group, params)
            if found.possible and found.fits(base.state):
                yield found


def _gradients(constrained: Sequence[ConstrainedParameters]) -> list[Tensor]:
    return [p.grad for held in constrained for p in held.params if p.grad is not None]


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
