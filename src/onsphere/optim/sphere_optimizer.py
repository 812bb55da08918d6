"""What every sphere optimizer shares: groups that name a sphere, and a state that survives a file.

A subclass says which update it makes and how it treats ordinary parameters. Nothing here knows the
update itself.
"""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from onsphere.errors import choice
from onsphere.geometry import Sphere
from onsphere.optim import kernels
from onsphere.optim.checkpoint.state_dict import encode, merged, take_over, with_all_counts
from onsphere.optim.checks.gradients import Nonfinite, check_gradients
from onsphere.optim.checks.notices import (
    immovable,
    lost_in,
    say_once,
    warn_of_decay,
    warn_of_rounding,
    warn_of_skips,
    without_sphere,
)
from onsphere.optim.checks.validation import check_sphere
from onsphere.optim.compiled import untraceable, untraced
from onsphere.optim.distributed import placement, sharded_step
from onsphere.optim.families import sets_of
from onsphere.optim.master_weights import gradient_of, point_of, round_to_params
from onsphere.optim.steps.fused import capturable, fusable
from onsphere.optim.steps.project import put_on
from onsphere.optim.steps.repeated import Ready, ReadyInSpace, ReadyOnSpheres
from onsphere.optim.steps.sphere_step import advance_all
from onsphere.optim.updates.geodesic import (
    LrMode,
    Retraction,
    StepOptions,
    reference_length,
    working_dtype,
)
from onsphere.optim.updates.per_coordinate import PerCoordinateUpdate
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.types import Family, Group, Part, rate_of

# Counts of skipped vectors stay on their device, and are looked at now and then.
_STEPS_BETWEEN_LOOKS = 128
_CUDA = torch.version.cuda is not None or torch.version.hip is not None


class SphereOptimizer(Optimizer):
    """A torch optimizer whose param groups may name a :class:`~onsphere.geometry.Sphere`.

    The state of a parameter on spheres holds, beside what the update needs,

    - ``radius``: one number per vector, in at least float32, recorded when the vector is first
      seen with a direction, so that a resumed run keeps the radius it started with;
    - ``skipped``: how often one of its vectors was left where it was;
    - ``master``: with ``master_weights`` the weight itself in float32, where it is in half
      precision. Its moments are in float32 then as well.

    The parameters of a joint sphere keep both with the first of them. ``state_dict()`` writes
    spheres as plain data, so a file loads with ``weights_only=True``.
    """

    # Class attributes, because Optimizer keeps nothing else through pickling and deepcopy.
    _told_of_skips = False
    _told_of_decay = False
    _steps_unlooked = 0
    # What is to be said of spheres that let nothing move, at the next step.
    _immovable = ""
    # Whether a group said of spheres that it has one, or (as an audit does) that it has none.
    _told_of_spheres = False
    _told_of_rounding = False
    # Whether a parameter is spread over processes (:mod:`~onsphere.optim.distributed.placement`).
    _sharded = False
    _on_the_way: tuple[Tensor, torch.Event] | None = None

    # Options that are words, and which.
    _words: ClassVar[Mapping[str, Sequence[str]]] = {
        "retraction": get_args(Retraction),
        "lr_mode": get_args(LrMode),
        "nonfinite": get_args(Nonfinite),
    }

    # What weight_decay is when nobody asked for it: no reason to warn.
    _usual_decay = 0.0

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        self._check_settings(defaults)
        super().__init__(params, {**defaults, "sphere": None})

    def _check_settings(self, settings: Group) -> None:
        """Raise for settings of a group that are out of range; a subclass adds its own.

        Words are put in the way they are written here.
        """
        lr = settings["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr is one number, got a tensor of shape {tuple(lr.shape)}")
        for name in ("lr", "weight_decay"):
            if not settings[name] >= 0:
                raise ValueError(f"{name} must be at least 0, got {settings[name]}")
        for name, allowed in self._words.items():
            settings[name] = choice(name, settings[name], allowed)
        if settings["capturable"] and settings["nonfinite"] == "raise":
            raise ValueError(
                'capturable=True does not go with nonfinite="raise": to raise, the step would wait '
                'for the device. Use nonfinite="skip"'
            )

    @abstractmethod
    def _updates(
        self, params: list[Tensor], group: Group
    ) -> Sequence[tuple[Tensor | None, Tensor | None, PerVectorUpdate | PerCoordinateUpdate]]:
        """Return momentum, second moment per coordinate and update of parameters on spheres."""

    @abstractmethod
    def _step_in_space(self, params: list[Tensor], grads: list[Tensor], group: Group) -> None:
        """Move ordinary parameters, exactly as the base optimizer does."""

    def _has_vector_moment(self, group: Group) -> bool:
        """Whether the update keeps a second moment per vector."""
        return group.get("second_moment") == "vector"

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss (optional).

        Returns:
            The closure's loss, or ``None``.

        Raises:
            RuntimeError: a parameter on a sphere has a sparse gradient.
            RuntimeError: a CUDA graph is being recorded and ``capturable`` is not set.
            FloatingPointError: a gradient is not finite, with ``nonfinite="raise"``. No
                parameter has moved.
        """
        if untraceable():
            return _as_written(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if _is_capturing() and not all(capturable(group) for group in self.param_groups):
            raise RuntimeError(
                f"a CUDA graph is being recorded, and a param group of {type(self).__name__} has "
                "capturable=False: its step asks the device for numbers. Give capturable=True"
            )
        self._immovable = say_once(self._immovable, stacklevel=4)
        self._warn_of_no_sphere()
        again = [self._again(group) for group in self.param_groups]
        dense = [ready is not None for ready in again]
        check_gradients(type(self).__name__, self.param_groups, dense, sharded=self._sharded)
        batches, counted, ways = [], [], []
        for group, ready in zip(self.param_groups, again, strict=True):
            if ready is not None and self._repeat(ready, group):
                continue
            if group["sphere"] is None:
                moving = [p for p in group["params"] if p.grad is not None]
                self._step_in_space(moving, self._gradients(moving), group)
                self._remember_in_space(group, moving)
            else:
                sets = [s for s in sets_of(group) if any(p.grad is not None for p in s)]
                batches.append((self._families(sets, group), group["sphere"], _options_of(group)))
                counted.append([members[0] for members in sets])
                ways.append(group)
                self._warn_of_rounding(sets, group)
        if batches:
            go = sharded_step.advance if self._sharded else advance_all
            for firsts, counts, group in zip(counted, go(batches), ways, strict=True):
                self._count(firsts, counts, told=not capturable(group))
            for group, (families, _, _) in zip(ways, batches, strict=True):
                self._remember(group, families)
            round_to_params(self.param_groups, self.state)
        self._look()
        return loss

    def _again(self, group: Group) -> Ready | None:
        """Return how the last step of a group was made, if this one can be made alike."""
        ready = self._ready.get(id(group))
        return ready if ready is not None and ready.fits(group, self.state) else None

    def _repeat(self, ready: Ready, group: Group) -> bool:
        """Make the step of a group as the last one; return whether there is one for all of it."""
        if isinstance(ready, ReadyInSpace):
            return self._step_in_space_again(ready, group)
        assert isinstance(ready, ReadyOnSpheres)
        update = self._update_again(ready, group)
        if update is None:
            return False
        counts = ready.step(update, _options_of(group))
        if any(counts):
            self._count(ready.params, list(counts))
        if group["lr_mode"] == "angle" and not self._told_of_rounding:
            self._warn_of_rounding([ready.params], group)
        return True

    def _remember(self, group: Group, families: list[Family]) -> None:
        """Keep what the next step of a group can be made of."""
        self._ready.pop(id(group), None)
        if self._sharded or group["master_weights"] or capturable(group):
            return
        if len(families) != len(group["params"]):
            return
        if kernels.Repeated.possible(families, group["sphere"]):
            call = kernels.Repeated(families, group["sphere"])
            self._ready[id(group)] = ReadyOnSpheres(call, group, self.state)

    def _remember_in_space(self, group: Group, moved: list[Tensor]) -> None:
        """Do the same for a group of ordinary parameters that the fused step has moved."""
        self._ready.pop(id(group), None)
        if self._sharded or len(moved) != len(group["params"]) or not kernels.allowed():
            return
        keys = self._fused_columns(group)
        if keys is not None and moved and moved[0].is_cpu:
            ready = ReadyInSpace(group, self.state, keys)
            grads = self._gradients(moved)
            if ready.possible and fusable(moved, grads, *ready.columns):
                self._ready[id(group)] = ready

    @abstractmethod
    def _fused_columns(self, group: Group) -> Sequence[str] | None:
        """Name the state that the fused step moves; ``None`` where it is not asked for."""

    @abstractmethod
    def _step_in_space_again(self, ready: ReadyInSpace, group: Group) -> bool:
        """Move ordinary parameters by the fused step; return whether it can be taken."""

    @abstractmethod
    def _update_again(
        self, ready: Ready, group: Group
    ) -> PerVectorUpdate | PerCoordinateUpdate | None:
        """Return the one update of parameters that have moved before, and count the step.

        ``None``, with nothing counted, where they have several.
        """

    @property
    def _ready(self) -> dict[int, Ready]:
        """By param group; not a part of what is saved or copied."""
        found: dict[int, Ready] = self.__dict__.setdefault("_ready_groups", {})
        return found

    @property
    def skipped(self) -> int:
        """How often a vector was left where it was, though it has a gradient.

        It was zero, its gradient not finite, or the update's direction unknown: lost in rounding
        beside its radial part, or to underflow. A gradient so large that its square overflows
        counts as not finite, one so small that its square underflows as none. The count per
        parameter is ``optimizer.state[param]["skipped"]``; reading either waits for the device.
        """
        return sum(int(state["skipped"]) for state in self.state.values() if "skipped" in state)

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group; ``sphere`` in it puts its parameters on that product of spheres.

        Raises:
            TypeError: ``sphere`` is neither a Sphere nor ``None``.
            ValueError: a setting is out of its range, or a parameter lacks the sphere's axes or is
                not real floating point.
        """
        settings = {**self.defaults, **param_group}
        self._check_settings(settings)
        param_group.update({name: settings[name] for name in self._words})
        asked = param_group.get("weight_decay", 0) != 0
        self._told_of_spheres = self._told_of_spheres or "sphere" in param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["sphere"] is not None:
                check_sphere(group["params"], group["sphere"])
        except (TypeError, ValueError):
            self.param_groups.pop()  # a refused group leaves nothing behind
            raise
        sharded = placement.any_in(group["params"])
        if sharded and capturable(group):
            self.param_groups.pop()
            raise ValueError(
                "capturable=True does not take parameters that are spread over processes "
                "(DTensor): their step waits for sums of the others. Leave it False"
            )
        self._sharded = self._sharded or sharded
        if group["sphere"] is not None:
            for members in sets_of(group):
                self._immovable = self._immovable or immovable(members, group["sphere"])
        # add_param_group also runs inside __init__, before a subclass could set the flag.
        decay = group.get("weight_decay", 0)
        asked = asked or decay != self._usual_decay
        if group["sphere"] is not None and decay and asked and not self._told_of_decay:
            self._told_of_decay = True
            warn_of_decay(decay, "; it is ignored there", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.optim`` does, with spheres as plain dictionaries."""
        packed = super().state_dict()
        if self._sharded:
            packed = with_all_counts(packed, self.param_groups, self.state)
        groups = [{**g, "sphere": encode(g["sphere"])} for g in packed["param_groups"]]
        return {**packed, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; a base optimizer's state dict is accepted as well.

        Options that the saved groups do not have (``sphere``, for a run that was not on one) keep
        the value they have here; a saved sphere that differs from the one here is used, with a
        warning. What is saved for each vector and moment is converted to this run's precision.

        Raises:
            ValueError: what is saved for a parameter has another size than its vectors here.
        """
        packed: dict[str, Any] = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            packed = hook(self, packed) or packed
        saved = packed["param_groups"]
        if len(saved) == len(self.param_groups):  # otherwise the base class says what is wrong
            saved = [
                merged(mine, theirs, number)
                for number, (mine, theirs) in enumerate(zip(self.param_groups, saved, strict=True))
            ]
        hooks = (
            self._optimizer_load_state_dict_pre_hooks,
            self._optimizer_load_state_dict_post_hooks,
        )
        # Those before have run, and those after must see what is taken over.
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        before = self.state, self.param_groups
        try:
            super().load_state_dict({**packed, "param_groups": saved})
            numbers = [n for group in saved for n in group["params"]]
            take_over(self.param_groups, self.state, packed["state"], numbers)
        except ValueError:
            self.__dict__["state"], self.__dict__["param_groups"] = before
            raise
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks[0]
            self._optimizer_load_state_dict_post_hooks = hooks[1]
        for after in hooks[1].values():
            after(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # which PyTorch adds to the defaults, and is not taken
                    group.setdefault(key, value)
        self._sharded = any(placement.any_in(group["params"]) for group in self.param_groups)

    def _gradients(self, params: list[Tensor]) -> list[Tensor]:
        """Return the gradients of parameters that have one, those of shards as their shards."""
        if not self._sharded:
            return [p.grad for p in params if p.grad is not None]
        return [g for p in params if (g := placement.local_gradient(p)) is not None]

    def _families(self, sets: list[list[Tensor]], group: Group) -> list[Family]:
        sphere: Sphere = group["sphere"]
        moving = [p for members in sets for p in members]
        updates = dict(zip(moving, self._updates(moving, group), strict=True))
        places = [
            [
                (point_of(p, group, self.state), gradient_of(p, group, sharded=self._sharded))
                for p in members
            ]
            for members in sets
        ]
        if sphere.radius is not None:
            onto = sharded_step.put_on if self._sharded else put_on
            for number, members in enumerate(sets):
                if "radius" not in self.state[members[0]]:
                    places[number] = onto(sphere, places[number])
        return [
            Family(
                [Part(x, g, *updates[p]) for p, (x, g) in zip(members, at, strict=True)],
                self._number(members, "radius", sphere),
                self._number(members, "vector_moment", sphere)
                if self._has_vector_moment(group)
                else None,
                _reference(members, group),
            )
            for members, at in zip(sets, places, strict=True)
        ]

    def _warn_of_no_sphere(self) -> None:
        if self._told_of_spheres:
            return
        self._told_of_spheres = True
        if not any(group["sphere"] is not None for group in self.param_groups):
            name = type(self).__name__
            words = without_sphere(name, f"torch.optim.{name.removeprefix('Sphere')}")
            say_once(words, stacklevel=5)

    def _warn_of_rounding(self, sets: list[list[Tensor]], group: Group) -> None:
        if self._told_of_rounding or group["lr_mode"] != "angle" or group["master_weights"]:
            return
        if isinstance(group["lr"], Tensor) and capturable(group):
            return  # its value is not waited for
        rate = rate_of(group)
        lost = next((p.dtype for s in sets for p in s if lost_in(p.dtype, rate)), None)
        if lost is not None:
            self._told_of_rounding = True
            warn_of_rounding(lost, rate, "master_weights=True", stacklevel=5)

    def _number(self, members: list[Tensor], key: str, sphere: Sphere) -> Tensor:
        """Return one number per vector from the state, zeros at first."""
        state = self.state[members[0]]
        if key not in state:
            state[key] = placement.numbers(members, sphere)
        elif state[key].dtype != working_dtype(members[0]):  # after model.to(dtype)
            state[key] = state[key].to(working_dtype(members[0]))
        return state[key]

    def _count(
        self, params: list[Tensor], counts: list[Tensor | int], *, told: bool = True
    ) -> None:
        """Add to the vectors left where they were, and say so the first time that one is."""
        for param in params:
            if "skipped" not in self.state[param]:
                zero = torch.zeros((), dtype=torch.int64, device=param.device)
                self.state[param]["skipped"] = zero
        some = [
            (self.state[param]["skipped"], count)
            for param, count in zip(params, counts, strict=True)
            if isinstance(count, Tensor) or count
        ]
        if some:
            totals = [total for total, _ in some]
            torch._foreach_add_(totals, [torch.as_tensor(count) for _, count in some])
            self._tell(sum(int(total) for total in totals if told and total.is_cpu))

    def _look(self) -> None:
        """Learn now and then what devices counted; a CUDA device is not waited for."""
        if self._told_of_skips or _is_capturing():
            return
        self._steps_unlooked += 1
        if self._steps_unlooked % _STEPS_BETWEEN_LOOKS != 1:
            return
        if self._on_the_way and self._on_the_way[1].query():
            self._tell(int(self._on_the_way[0]))
        counts = [state["skipped"] for state in self.state.values() if "skipped" in state]
        away = [count for count in counts if count.device.type == "cuda"]
        if away:
            with torch.cuda.device(away[0].device):
                # The count of one device is enough to warn of.
                total = torch.stack([x for x in away if x.device == away[0].device]).sum()
                self._on_the_way = total.to("cpu", non_blocking=True), torch.Event(away[0].device)
                self._on_the_way[1].record()
        self._tell(sum(int(x) for x in counts if x.device.type not in ("cpu", "cuda")))

    def _tell(self, left: int) -> None:
        if left and not self._told_of_skips:
            self._told_of_skips = True
            name, gradient = type(self).__name__, "not finite, too small, or all along the radius"
            warn_of_skips(name, left, gradient, stacklevel=5)


_as_written = untraced(SphereOptimizer.step)


def _reference(members: list[Tensor], group: Group) -> float:
    if group["lr_mode"] != "relative":
        return 1.0
    return reference_length(tuple(tuple(p.shape) for p in members), group["sphere"])


def _options_of(group: Group) -> StepOptions:
    sphere, recorded = group["sphere"], capturable(group)
    return StepOptions(
        rate_of(group) if recorded else float(rate_of(group)),
        group["lr_mode"],
        group["retraction"],
        sphere.radius,
        sphere.centered,
        group["maximize"],
        capturable=recorded,
    )


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded, in which no device may be asked for anything."""
    return _CUDA and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
