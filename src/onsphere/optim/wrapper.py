"""Any optimizer of PyTorch, with weights that stay on spheres."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from onsphere.geometry import Sphere
from onsphere.optim import kernels
from onsphere.optim.distributed import placement, sharded_step
from onsphere.optim.hooks import without_global_hooks
from onsphere.optim.state_dict import numbers_of
from onsphere.optim.steps.displacement import Buffers, Displacements, steps_from_anywhere
from onsphere.optim.steps.project import (
    ConstrainedParameters,
    constrain,
    record,
    repeated,
    restore,
)
from onsphere.optim.steps.sphere_step import advance_all
from onsphere.optim.updates.geodesic import StepOptions
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.types import Family, Group, Part
from onsphere.optim.validation import (
    check_sphere,
    immovable,
    lost_in,
    refuse_sparse,
    say_once,
    warn_of_rounding,
)

Mode = Literal["hard", "brake", "rotate"]
Nonfinite = Literal["skip", "raise", "ignore"]
Closure = Callable[[], float]
Spheres = Mapping[Tensor, Sphere] | Mapping[tuple[Tensor, ...], Sphere] | Iterable[Group]


# Where radii lie in the state dict of a base whose own is not like PyTorch's.
_BESIDE = "on_sphere"
# What is constrained, by number, with the gradients that are to be put back.
_Hidden = dict[int, tuple[ConstrainedParameters, list[Tensor | None]]]


def on_sphere(
    optimizer: Optimizer,
    spheres: Spheres,
    mode: Mode = "hard",
    *,
    growth_factor: float = 0.0,
    nonfinite: Nonfinite = "skip",
) -> "OnSphere":
    r"""Keep weights on spheres while any optimizer of PyTorch moves them.

    - ``"hard"``: after every step each vector is scaled back to its radius. The radial part of the
      update, weight decay included, only changes the effective rate a little
      (:mod:`~onsphere.optim.steps.project`). One number per vector is remembered.
    - ``"brake"``: vectors may shrink; of its growth a vector keeps the share ``growth_factor``.
    - ``"rotate"``: each vector turns by exactly ``lr`` radians, ``lr`` being its param group's,
      into the direction of the update; neither its size nor weight decay matters. Keeps memory
      for a copy of the weights on spheres. The optimizers of PyTorch step from zero, so that the
      update is known to its own rounding (:mod:`~onsphere.optim.steps.displacement`); of another,
      whose update does not depend on the weights either, set ``steps_from_anywhere = True``.

    The result *is* a ``torch.optim.Optimizer`` that shares ``param_groups`` and ``state`` with the
    one it wraps: give it to schedulers, gradient scalers and ``closure``-driven loops in its
    place. Gradients are never changed. The base optimizer's momentum is its own affair; for
    momentum that stays tangent use :class:`~onsphere.optim.SphereSGD` or
    :class:`~onsphere.optim.SphereAdamW`.

    Args:
        optimizer: the optimizer to wrap.
        spheres: parameter -> sphere, or a tuple of parameters -> their joint sphere; or param
            groups with ``params`` and ``sphere``, as :class:`~onsphere.optim.SphereAdamW` takes
            them (groups without a sphere are passed over).
        mode: see above.
        growth_factor: share of a vector's growth that the brake lets pass, from 0 to 1.
        nonfinite: what a gradient that is not finite does: ``"skip"`` its parameter (the base
            optimizer sees no gradient), ``"raise"`` before anything moves, or ``"ignore"``, which
            saves a pass over the gradients.

    Returns:
        The wrapped optimizer.

    Raises:
        ValueError: a parameter is not the optimizer's, is named twice, or does not fit its sphere;
            an option out of its range.

    Example:
        >>> import torch
        >>> from onsphere.geometry import Sphere, VectorAxes
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> adam = torch.optim.Adam([weight], lr=0.1)
        >>> optimizer = on_sphere(adam, {weight: Sphere(VectorAxes(index=(0,)))})
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.detach().norm(dim=1).round(decimals=5)
        tensor([5., 1.])
    """
    return OnSphere(optimizer, spheres, mode, growth_factor=growth_factor, nonfinite=nonfinite)


class OnSphere(Optimizer):
    """What :func:`on_sphere` returns.

    Its state dict is the base optimizer's, with ``radius`` and ``skipped`` added to the state of
    the first parameter of each family; it also loads what the base optimizer saved.
    """

    base: Optimizer
    constrained: list[ConstrainedParameters]
    mode: Mode
    nonfinite: Nonfinite

    def __init__(
        self,
        optimizer: Optimizer,
        spheres: Spheres,
        mode: Mode = "hard",
        *,
        growth_factor: float = 0.0,
        nonfinite: Nonfinite = "skip",
    ) -> None:
        for name, given, allowed in (
            ("mode", mode, get_args(Mode)),
            ("nonfinite", nonfinite, get_args(Nonfinite)),
        ):
            if given not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")
        if not 0 <= growth_factor <= 1:
            raise ValueError(f"growth_factor is a share from 0 to 1, got {growth_factor}")
        self.base = optimizer
        self.constrained = []
        self.mode, self.growth_factor, self.nonfinite = mode, growth_factor, nonfinite
        self.pending = True  # whether a vector may lack its radius
        self.sharded = False  # whether a parameter is spread over processes
        self.told_of_skips = self.told_of_decay = self.told_of_rounding = False
        # What a base with `train` and `eval` wants back after weights were evaluated on spheres.
        self.between: list[tuple[Tensor, Tensor]] = []
        self.immovable = ""  # what is to be said of spheres that let nothing move
        # Not Optimizer.__init__, which would make param groups and a state of its own.
        self.__setstate__({})
        for params, sphere in families(spheres):
            self._put(params, sphere)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Of mode "rotate", and calls that can be made again: not worth a place in a file.
        self.buffers = Buffers()
        self.finite: Callable[[list[Tensor]], bool | None] | None = None
        self.restoring: list[tuple[kernels.RepeatedRestore, list[ConstrainedParameters]]] = []

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The base optimizer's param groups."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base.defaults

    @property
    def skipped(self) -> int:
        """How often a vector was left where it was: without direction, or not finite."""
        return sum(int(held.skipped) for held in self.constrained)

    def radius_of(self, param: Tensor) -> Tensor:
        """Return the radii of a parameter's vectors (of a joint sphere: with its first one)."""
        return next(held.radius for held in self.constrained if held.params[0] is param)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Closure | None = None
    ) -> float | None:
        """Take a step of the base optimizer and bring the weights to their spheres.

        Args:
            closure: reevaluates the model and returns the loss (optional, or as the base
                optimizer requires it).

        Returns:
            The closure's loss, or ``None``.

        Raises:
            RuntimeError: a parameter on a sphere has a sparse gradient.
            FloatingPointError: a gradient is not finite, with ``nonfinite="raise"``.
        """
        self.immovable = say_once(self.immovable, stacklevel=4)
        if self.pending:
            self.pending = (sharded_step.record if self.sharded else record)(self.constrained)
        hidden: _Hidden = {}
        added: dict[Tensor, Tensor] = {}
        try:
            if closure is None:
                self._hide(hidden)
            with without_global_hooks():  # they run around this step
                if self.mode == "rotate":
                    loss, added = self._step_for_updates(closure, hidden)
                elif closure is None:
                    loss = self.base.step()
                else:
                    loss = self.base.step(self._guarded(closure, hidden))
        finally:
            for held, grads in hidden.values():
                for param, grad in zip(held.params, grads, strict=True):
                    param.grad = grad
        left = self._rotate(added) if self.mode == "rotate" else self._restore()
        for held, _ in hidden.values():
            vectors = placement.local(held.radius).numel()
            held.skipped.add_(vectors)
            left = left + vectors
        self._warn_of_skips(left)
        return loss

    def __getattr__(self, name: str) -> Any:
        """Reach what the base optimizer has besides: its methods and settings."""
        base = self.__dict__.get("base")
        if base is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(base, name)
        return {"eval": self._to_eval, "train": self._to_train}.get(name, found)

    @torch.no_grad()
    def _to_eval(self) -> None:
        """Let the base put in the weights to evaluate, and bring them to their spheres as well."""
        if self.between:
            return
        self.base.eval()  # type: ignore[attr-defined]
        self.between = [(param, param.detach().clone()) for param in self._moving()]
        back = sharded_step.restore if self.sharded else restore
        back(self.constrained)

    @torch.no_grad()
    def _to_train(self) -> None:
        """Give the base back what it has put in, and let it go on."""
        for param, raw in self.between:
            param.copy_(raw)
        self.between = []
        self.base.train()  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group to the base optimizer; ``sphere`` in it puts it on that sphere."""
        sphere = param_group.get("sphere")
        self.base.add_param_group({k: v for k, v in param_group.items() if k != "sphere"})
        if sphere is not None:
            try:
                params = self.param_groups[-1]["params"]
                for family, own in families([{"params": params, "sphere": sphere}]):
                    self._put(family, own)
            except (TypeError, ValueError):
                self.param_groups.pop()  # a refused group leaves nothing behind
                raise

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict with the radii beside the rest."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        packed = self.base.state_dict()
        skips = [held.skipped for held in self.constrained]
        if self.sharded:
            counts = [(held.params, held.sphere, held.skipped) for held in self.constrained]
            skips = placement.added_counts(counts)
        own = [
            {"radius": held.radius, "skipped": skipped}
            for held, skipped in zip(self.constrained, skips, strict=True)
        ]
        if not _is_of_pytorch(packed):
            packed = {**packed, _BESIDE: own}
        else:
            numbers, state = numbers_of(self.param_groups, packed), dict(packed["state"])
            for held, entries in zip(self.constrained, own, strict=True):
                number = numbers[held.params[0]]
                state[number] = {**state.get(number, {}), **entries}
            packed = {**packed, "state": state}
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; the base optimizer's own is accepted as well."""
        packed = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            packed = hook(self, packed) or packed
        if _BESIDE in packed:
            for held, entries in zip(self.constrained, packed.pop(_BESIDE), strict=True):
                self._load_own(held, entries["radius"], entries["skipped"])
        if not _is_of_pytorch(packed):
            self._load_base(packed)
            return
        # PyTorch takes step counts over without a copy: two runs would count on one tensor.
        state = {
            number: {key: _own_scalar(value) for key, value in entries.items()}
            for number, entries in packed["state"].items()
        }
        numbers = numbers_of(self.param_groups, packed)
        for held in self.constrained:
            entries = state.get(numbers.get(held.params[0], -1), {})
            if not {"radius", "skipped"} <= entries.keys():
                continue  # an entry of the base optimizer's own may have one of these names
            self._load_own(held, entries.pop("radius"), entries.pop("skipped"))
        # What held nothing but radii was never seen by the base optimizer.
        packed["state"] = {number: entries for number, entries in state.items() if entries}
        self._load_base(packed)

    def _load_own(self, held: ConstrainedParameters, radius: Tensor, skipped: Tensor) -> None:
        if radius.shape != held.radius.shape:
            raise ValueError(
                f"the saved radii have shape {tuple(radius.shape)}, the spheres given here "
                f"want {tuple(held.radius.shape)}; resume with the same spheres"
            )
        held.radius.copy_(radius)
        held.skipped.copy_(skipped)
        if self.sharded and not placement.counts_for_all(held.params, held.sphere):
            held.skipped.zero_()

    def _load_base(self, packed: dict[str, Any]) -> None:
        self.base.load_state_dict(packed)
        self.pending = True
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        keys = (
            "base",
            "constrained",
            "pending",
            "sharded",
            "mode",
            "growth_factor",
            "nonfinite",
            "between",
        )
        told = ("told_of_skips", "told_of_decay", "told_of_rounding", "immovable")
        return {key: self.__dict__[key] for key in (*keys, *told)}

    def __repr__(self) -> str:
        return f"on_sphere(mode={self.mode!r}, {self.base!r})"

    def _put(self, params: tuple[Tensor, ...], sphere: Sphere) -> None:
        mine = {p for group in self.param_groups for p in group["params"]}
        taken = {p for held in self.constrained for p in held.params}
        check_sphere(params, sphere)
        for param in params:
            if param not in mine:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} is given a sphere but is not one "
                    "of the optimizer's; give it to the optimizer as well"
                )
            if param in taken:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} is given two spheres; "
                    "a parameter has one"
                )
        if any(p.numel() for p in params):
            self.constrained.append(constrain(params, sphere, placement.numbers(params, sphere)))
            self.sharded = self.sharded or placement.any_in(params)
            self.immovable = self.immovable or immovable(params, sphere)
        self.pending = True
        self._warn_of_decay(params)

    def _moving(self) -> list[Tensor]:
        return [p for held in self.constrained for p in held.params]

    def _hide(self, hidden: _Hidden) -> None:
        """Take gradients that are not finite away from the base optimizer, to be put back."""
        grads = [grad for p in self._moving() if (grad := p.grad) is not None]
        refuse_sparse(grads, "on_sphere")
        if self.nonfinite == "ignore" or not grads:
            return
        bad = self._unfinite(grads)
        if bad and self.nonfinite == "raise":
            raise FloatingPointError(
                f"gradients of {len(bad)} weights on spheres are not finite, and "
                'nonfinite="raise"; no parameter was moved. Clear them, or use nonfinite="skip"'
            )
        for number in bad:
            held = self.constrained[number]
            hidden.setdefault(number, (held, [p.grad for p in held.params]))
            for param in held.params:
                param.grad = None

    def _unfinite(self, grads: list[Tensor]) -> list[int]:
        """Return the numbers of the constrained whose gradients are not finite."""
        if self.sharded:
            flags = placement.unfinite([held.params for held in self.constrained])
            return [number for number, flag in enumerate(flags) if flag]
        fine = None if self.finite is None else self.finite(grads)
        if fine is None:
            fine, self.finite = kernels.finite(grads), kernels.finite_of(grads)
        if fine:
            return []
        norms = torch.stack([x.float() for x in torch._foreach_norm(grads)])
        if bool(norms.isfinite().all()):
            return []
        return [
            number
            for number, held in enumerate(self.constrained)
            if any(p.grad is not None and not p.grad.float().norm().isfinite() for p in held.params)
        ]

    def _restore(self) -> int | Tensor:
        """Bring the weights back to their spheres; return how many vectors could not be."""
        brake, growth = self.mode == "brake", self.growth_factor
        if self.sharded:
            return sharded_step.restore(self.constrained, brake=brake, growth=growth)
        calls = self.restoring
        if sum(len(held) for _, held in calls) != len(self.constrained) or not all(
            call.again() for call, _ in calls
        ):
            self.restoring = repeated(self.constrained)
            return restore(self.constrained, brake=brake, growth=growth)
        left = 0
        for call, many in calls:
            for held, count in zip(many, call.restore(brake=brake, growth=growth), strict=True):
                if count:
                    held.skipped.add_(count)
                    left += count
        return left

    def _guarded(
        self, closure: Closure, hidden: _Hidden, displaced: Displacements | None = None
    ) -> Closure:
        """Return a closure that sees the weights, and hides gradients that are not finite."""

        def guarded() -> float:
            if displaced is not None:
                displaced.visit()
            with torch.enable_grad():
                loss = closure()
            self._hide(hidden)
            if displaced is not None:
                displaced.leave()
            return loss

        return guarded

    def _step_for_updates(
        self, closure: Closure | None, hidden: _Hidden
    ) -> tuple[float | None, dict[Tensor, Tensor]]:
        """Step with the base, the weights kept; return the loss and what it adds to each."""
        moving = [p for p in self._moving() if p.grad is not None or closure is not None]
        if not steps_from_anywhere(self.base):
            before = [p.detach().clone() for p in moving]
            loss = (
                self.base.step()
                if closure is None
                else self.base.step(self._guarded(closure, hidden))
            )
            added = {p: p.detach() - x for p, x in zip(moving, before, strict=True)}
            for p, x in zip(moving, before, strict=True):
                p.copy_(x)
            return loss, added
        displaced = Displacements(moving, self.buffers)
        try:
            if closure is None:
                loss = self.base.step()
            else:
                loss = self.base.step(self._guarded(closure, hidden, displaced))
        finally:
            added = displaced.arrive()
        return loss, added

    def _rotate(self, added: dict[Tensor, Tensor]) -> int | Tensor:
        """Turn the vectors of parameters that something was added to."""
        rates = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        alike: dict[tuple[Sphere, float], list[ConstrainedParameters]] = {}
        for held in self.constrained:
            if any(param in added for param in held.params):
                rate = _rate(rates[held.params[0]])
                self._warn_of_rounding(held.params[0].dtype, rate)
                alike.setdefault((held.sphere, rate), []).append(held)
        batches, moved = [], []
        for (sphere, rate), many in alike.items():
            families = []
            for held in many:
                parts = [_turning(p, added.get(p), sphere) for p in held.params]
                families.append(Family(parts, held.radius))
            options = StepOptions(rate, "angle", "projection", sphere.radius, sphere.centered)
            batches.append((families, sphere, options))
            moved += many
        left: int | Tensor = 0
        counts = (sharded_step.advance if self.sharded else advance_all)(batches)
        for held, count in zip(moved, itertools.chain(*counts), strict=True):
            held.skipped.add_(count)
            left = left + count
            if not isinstance(count, int) or count or held.sphere.centered:
                self.buffers.forget(held.params)
        return left

    def _warn_of_rounding(self, dtype: torch.dtype, rate: float) -> None:
        if not self.told_of_rounding and lost_in(dtype, rate):
            self.told_of_rounding = True
            mended = "SphereAdamW or SphereSGD with master_weights=True"
            warn_of_rounding(dtype, rate, mended, stacklevel=6)

    def _warn_of_decay(self, params: tuple[Tensor, ...]) -> None:
        if self.told_of_decay or self.mode == "brake":
            return
        for group in self.param_groups:
            decay = group.get("weight_decay", 0)
            if decay and any(p is q for p in params for q in group["params"]):
                self.told_of_decay = True
                warnings.warn(
                    f"weight_decay={decay} does nothing to weights on a sphere: it points along "
                    "the radius, which is fixed. Give those groups weight_decay=0",
                    UserWarning,
                    stacklevel=5,
                )
                return

    def _warn_of_skips(self, left: int | Tensor) -> None:
        if self.told_of_skips:
            return
        if isinstance(left, Tensor) and left.device.type != "cpu":
            return  # reading it would wait for the device; `skipped` has the count
        if int(left):
            self.told_of_skips = True
            warnings.warn(
                f"on_sphere left {int(left)} vectors where they were: they are zero and have no "
                "direction (give them a start that is not 0, or leave them off spheres), or their "
                "gradient is not finite, or their update all along the radius. The running count "
                "is optimizer.skipped; this is said once",
                UserWarning,
                stacklevel=4,
            )


def _turning(param: Tensor, added: Tensor | None, sphere: Sphere) -> Part:
    """Turn a parameter towards what was added to it; that is zero afterwards, where it could."""
    if added is None:
        added = torch.zeros_like(param)
    if sphere.centered:  # which takes the mean off gradients only
        return Part(param, -added, None, None, PerVectorUpdate(0.0, 1.0, 1.0, 0.0))
    # As momentum that nothing remains of; the gradient has no weight but must be there.
    return Part(param, added, added, None, PerVectorUpdate(0.0, 0.0, 0.0, -1.0))


def _is_of_pytorch(packed: Mapping[str, Any]) -> bool:
    """Whether a state dict is one of PyTorch's, with a state by number that radii can be put in."""
    groups = packed.get("param_groups", ())
    return isinstance(packed.get("state"), Mapping) and all("params" in g for g in groups)


def _rate(lr: Any) -> float:
    if lr is None:
        raise ValueError(
            'mode="rotate" turns vectors by the lr of their param group, and this one has lr=None; '
            'give it a number of radians, or use mode="hard"'
        )
    return float(lr)


def _own_scalar(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and not value.ndim else value


def families(spheres: Spheres) -> Iterable[tuple[tuple[Tensor, ...], Sphere]]:
    """Cut what the user gave into sets of parameters that share spheres."""
    if isinstance(spheres, Mapping):
        pairs = [(key if isinstance(key, tuple) else (key,), s) for key, s in spheres.items()]
    else:
        pairs = [
            (tuple([g["params"]] if isinstance(g["params"], Tensor) else g["params"]), g["sphere"])
            for g in spheres
            if g.get("sphere") is not None
        ]
    for params, sphere in pairs:
        if getattr(sphere, "joint", False):
            yield params, sphere
        else:
            yield from (((param,), sphere) for param in params)
