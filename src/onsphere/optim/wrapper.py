"""Any optimizer of PyTorch, with weights that stay on spheres."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from onsphere.errors import choice
from onsphere.geometry import Sphere
from onsphere.optim.checkpoint.base_state_dict import rates_of, take_radii, with_radii
from onsphere.optim.checks.gradients import BaseNonfinite, Hidden, Screen
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
from onsphere.optim.families import Spheres, families, resolved
from onsphere.optim.hooks import without_global_hooks
from onsphere.optim.modes import one_pass
from onsphere.optim.modes.restore import Restorer
from onsphere.optim.modes.rotate import rotate, step_for_updates
from onsphere.optim.steps.displacement import Buffers, Displacements
from onsphere.optim.steps.project import ConstrainedParameters, constrain, record, restore
from onsphere.optim.updates.torch_optim import BaseMode
from onsphere.optim.updates.types import Group

Mode = Literal["hard", "brake", "rotate"]
Closure = Callable[[], float]


def on_sphere(
    optimizer: Optimizer,
    spheres: Spheres | None = None,
    mode: Mode = "hard",
    *,
    growth_factor: float = 0.0,
    nonfinite: BaseNonfinite = "skip",
) -> "OnSphere":
    r"""Keep weights on spheres while any optimizer of PyTorch moves them.

    - ``"hard"``: after every step each vector is scaled back to its radius. The radial part of the
      update, weight decay included, only changes the effective rate a little
      (:mod:`~onsphere.optim.steps.project`). One number per vector is remembered.
    - ``"brake"``: vectors may shrink; of its growth a vector keeps the share ``growth_factor``.
    - ``"rotate"``: each vector turns by exactly ``lr`` radians, ``lr`` being its param group's,
      into the direction of the update; neither its size nor weight decay matters. Keeps memory
      for a copy of the weights on spheres, unless a kernel makes the step (see below). The
      optimizers of PyTorch step from zero, so that the update is known to its own rounding
      (:mod:`~onsphere.optim.steps.displacement`); of another, whose update does not depend on the
      weights either, set ``steps_from_anywhere = True``.

    What PyTorch's own AdamW, Adam and SGD do in ``"hard"`` and ``"rotate"`` to plain weights in
    float32 on the CPU, a native kernel does in one pass over memory, on their state and with their
    numbers to rounding (:mod:`~onsphere.optim.modes.one_pass`).

    The result *is* a ``torch.optim.Optimizer`` that shares ``param_groups`` and ``state`` with the
    one it wraps: give it to schedulers, gradient scalers and ``closure``-driven loops in its
    place. Gradients are never changed. The base optimizer's momentum is its own affair; for
    momentum that stays tangent use :class:`~onsphere.optim.SphereSGD` or
    :class:`~onsphere.optim.SphereAdamW`.

    Args:
        optimizer: the optimizer to wrap.
        spheres: an audit of the model; or parameter -> sphere, or a tuple of parameters -> their
            joint sphere; or param groups with ``params`` and ``sphere``, as
            :class:`~onsphere.optim.SphereAdamW` takes them; those without a sphere are passed over.
            Without any, the optimizer's own param groups say it.
        mode: see above.
        growth_factor: share of a vector's growth that the brake lets pass, from 0 to 1.
        nonfinite: what a gradient that is not finite does: ``"skip"`` its parameter (the base
            optimizer sees no gradient), ``"raise"`` before anything moves, or ``"ignore"``, which
            saves a pass over the gradients. Where a kernel makes the step, a vector with such a
            gradient then stays.

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
    nonfinite: BaseNonfinite

    def __init__(
        self,
        optimizer: Optimizer,
        spheres: Spheres | None = None,
        mode: Mode = "hard",
        *,
        growth_factor: float = 0.0,
        nonfinite: BaseNonfinite = "skip",
    ) -> None:
        mode = cast(Mode, choice("mode", mode, get_args(Mode)))
        words = get_args(BaseNonfinite)
        nonfinite = cast(BaseNonfinite, choice("nonfinite", nonfinite, words))
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
        asked = resolved(optimizer.param_groups if spheres is None else spheres)
        for params, sphere in families(asked):
            self._put(params, sphere)
        if isinstance(asked, list) and not any("sphere" in group for group in asked):
            base = type(optimizer).__name__
            say_once(without_sphere("on_sphere", base), stacklevel=3)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Of mode "rotate", and calls that can be made again: not worth a place in a file.
        self.buffers = Buffers()
        self.screen = Screen()
        self.restorer = Restorer()
        self.one_pass = one_pass.OnePass()

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
        known = self.mode != "brake" and not self.sharded and one_pass.knows(self.base)
        if untraceable() or (torch.compiler.is_compiling() and known and self._on_cpu()):
            return _as_written(self, closure)  # the kernels' numbers, compiled or not
        self.immovable = say_once(self.immovable, stacklevel=4)
        if self.pending:
            self.pending = (sharded_step.record if self.sharded else record)(self.constrained)
        loss = None
        if self.mode == "brake" or not known:
            loss, left = self._step_of_base(self.constrained, closure)
        else:
            if closure is not None:  # these evaluate it once, before they step
                with torch.enable_grad():
                    loss = closure()
            left = self._step_of_known_base(self.mode)
        self._warn_of_skips(left)
        return loss

    def _step_of_known_base(self, mode: BaseMode) -> int | Tensor:
        """Let kernels make its step as far as they can, and the base the rest."""
        if self.nonfinite == "raise":  # before anything moves
            self._hide(self.constrained, {})
        moved = self.one_pass.step(
            self.base,
            self.constrained,
            mode=mode,
            look=self.nonfinite == "skip",
            before_turning=self._warn_of_rounding,
        )
        self.buffers.drop(moved.params)
        if moved.everything:
            return moved.left
        done = set(map(id, moved.held))
        with one_pass.without_gradients(moved.params):
            _, left = self._step_of_base(
                [held for held in self.constrained if id(held) not in done], None
            )
        return left + moved.left

    def _step_of_base(
        self, rest: list[ConstrainedParameters], closure: Closure | None
    ) -> tuple[float | None, int | Tensor]:
        """Let the base step and bring the rest to its spheres; return how many vectors stayed."""
        hidden: Hidden = {}
        added: dict[Tensor, Tensor] = {}
        try:
            if closure is None:
                self._hide(rest, hidden)
            with without_global_hooks():  # they run around this step
                if self.mode == "rotate":
                    loss, added = self._step_for_updates(rest, closure, hidden)
                elif closure is None:
                    loss = self.base.step()
                else:
                    loss = self.base.step(self._guarded(rest, closure, hidden))
        finally:
            for held, grads in hidden.values():
                for param, grad in zip(held.params, grads, strict=True):
                    param.grad = grad
        if self.mode == "rotate":
            left = rotate(
                rest, self.param_groups, added, self.buffers,
                sharded=self.sharded, before_turning=self._warn_of_rounding,
            )  # fmt: skip
        else:
            left = self.restorer.restore(
                rest, brake=self.mode == "brake", growth=self.growth_factor,
                sharded=self.sharded,
            )  # fmt: skip
        for held, _ in hidden.values():
            vectors = placement.local(held.radius).numel()
            held.skipped.add_(vectors)
            left = left + vectors
        return loss, left

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
        packed = with_radii(
            self.base.state_dict(), self.param_groups, self.constrained, sharded=self.sharded
        )
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; the base optimizer's own is accepted as well."""
        packed = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            packed = hook(self, packed) or packed
        if self.mode == "rotate":
            packed = rates_of(packed, self.param_groups)
        packed = take_radii(packed, self.param_groups, self.constrained, sharded=self.sharded)
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

    def _on_cpu(self) -> bool:
        return any(held.params[0].is_cpu for held in self.constrained)

    def _moving(self) -> list[Tensor]:
        return [p for held in self.constrained for p in held.params]

    def _hide(self, constrained: list[ConstrainedParameters], hidden: Hidden) -> None:
        """Take gradients that are not finite away from the base optimizer, to be put back."""
        self.screen.hide(constrained, hidden, nonfinite=self.nonfinite, sharded=self.sharded)

    def _guarded(
        self,
        rest: list[ConstrainedParameters],
        closure: Closure,
        hidden: Hidden,
        displaced: Displacements | None = None,
    ) -> Closure:
        """Return a closure that sees the weights, and hides gradients that are not finite."""

        def guarded() -> float:
            if displaced is not None:
                displaced.visit()
            with torch.enable_grad():
                loss = closure()
            self._hide(rest, hidden)
            if displaced is not None:
                displaced.leave()
            return loss

        return guarded

    def _step_for_updates(
        self, rest: list[ConstrainedParameters], closure: Closure | None, hidden: Hidden
    ) -> tuple[float | None, dict[Tensor, Tensor]]:
        """Step with the base, the weights kept; return the loss and what it adds to each."""
        params = [p for held in rest for p in held.params]
        if closure is None:
            moving = [p for p in params if p.grad is not None]
            return step_for_updates(self.base, moving, self.buffers, None)
        given = closure
        return step_for_updates(
            self.base,
            params,
            self.buffers,
            lambda displaced: self._guarded(rest, given, hidden, displaced),
        )

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
                warn_of_decay(decay, "", stacklevel=5)
                return

    def _warn_of_skips(self, left: int | Tensor) -> None:
        if self.told_of_skips:
            return
        if isinstance(left, Tensor) and left.device.type != "cpu":
            return  # reading it would wait for the device; `skipped` has the count
        if int(left):
            self.told_of_skips = True
            radial = "not finite, or their update all along the radius"
            warn_of_skips("on_sphere", int(left), radial, stacklevel=4)


_as_written = untraced(OnSphere.step)  # before PyTorch puts its hooks around it
