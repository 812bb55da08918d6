"""What every sphere optimizer shares: groups that name a sphere, and a state that survives a file.

A subclass says how it moves one parameter on its spheres and how it treats ordinary parameters.
Nothing here knows which update is being made.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from onsphere.geometry import Sphere, VectorAxes

Group = dict[str, Any]

# One number per vector that must come back as it was saved. Optimizer.load_state_dict casts every
# state tensor to the parameter's dtype, which in bfloat16 would move every radius.
_EXACT = ("radius", "skipped")
# Without an accelerator, counting skipped vectors costs nothing; with one it waits for the device.
_STEPS_BETWEEN_LOOKS = 128


class SphereOptimizer(Optimizer):
    """A torch optimizer whose param groups may name a :class:`~onsphere.geometry.Sphere`.

    The state of a parameter on spheres holds, beside what the update needs,

    - ``radius``: one number per vector, in at least float32, recorded when the vector is first
      seen with a direction, so that a resumed run keeps the radius it started with;
    - ``skipped``: how often one of its vectors was left where it was.

    ``state_dict()`` writes spheres as plain data, so a file loads with ``weights_only=True``.
    """

    # Class attributes, because Optimizer keeps nothing else through pickling and deepcopy.
    _told_of_skips = False
    _told_of_decay = False
    _steps_unlooked = 0

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        super().__init__(params, {**defaults, "sphere": None})

    @abstractmethod
    def _step_on_sphere(self, param: Tensor, grad: Tensor, group: Group) -> Tensor:
        """Move one parameter and return which vectors were sound (bool, one per vector)."""

    @abstractmethod
    def _step_in_space(self, params: list[Tensor], grads: list[Tensor], group: Group) -> None:
        """Move ordinary parameters, exactly as the base optimizer does."""

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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if group["sphere"] is None:
                self._step_in_space(moving, [p.grad for p in moving], group)
            else:
                for param in moving:
                    self._step_checked(param, group)
        self._warn_of_skips()
        return loss

    @property
    def skipped(self) -> int:
        """How often a vector was left where it was: it was zero, or its gradient not finite.

        A gradient so large that its square overflows counts as not finite. The count per
        parameter is ``optimizer.state[param]["skipped"]``; reading either waits for the device.
        """
        return sum(int(state["skipped"]) for state in self.state.values() if "skipped" in state)

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group; ``sphere`` in it puts its parameters on that product of spheres.

        Raises:
            TypeError: ``sphere`` is neither a Sphere nor ``None``.
            ValueError: a parameter lacks the sphere's axes, or is not real floating point.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()  # a refused group leaves nothing behind
            raise
        # add_param_group also runs inside __init__, before a subclass could set the flag.
        if group["sphere"] is not None and group.get("weight_decay", 0) and not self._told_of_decay:
            self._told_of_decay = True
            warnings.warn(
                f"weight_decay={group['weight_decay']} does nothing to weights on a sphere: it "
                "points along the radius, which is fixed; it is ignored there. Give those groups "
                "weight_decay=0",
                UserWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.optim`` does, with spheres as plain dictionaries."""
        packed = super().state_dict()
        groups = [{**g, "sphere": _encode(g["sphere"])} for g in packed["param_groups"]]
        return {**packed, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; a base optimizer's state dict is accepted as well.

        Options that the saved groups do not have (``sphere``, for a run that was not on one) keep
        the value they have here.
        """
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):  # otherwise the base class says what is wrong
            saved = [
                {
                    **{key: value for key, value in mine.items() if key not in _OF_THE_PARAMS},
                    **theirs,
                    "sphere": _decode(theirs.get("sphere", mine["sphere"])),
                }
                for mine, theirs in zip(self.param_groups, saved, strict=True)
            ]
        super().load_state_dict({**state_dict, "param_groups": saved})
        numbers = (number for group in saved for number in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for number, param in zip(numbers, params, strict=True):
            for key in _EXACT:
                if key in state_dict["state"].get(number, {}):
                    exact = state_dict["state"][number][key]
                    self.state[param][key] = exact.detach().to(param.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("sphere", None)

    def _step_checked(self, param: Tensor, group: Group) -> None:
        grad = param.grad
        if grad is None or param.numel() == 0:
            return
        if grad.is_sparse or grad.layout is not torch.strided:
            raise RuntimeError(
                f"{type(self).__name__} needs a dense gradient for weights on a sphere, got layout "
                f"{grad.layout}; make the layer dense (sparse=False) or leave it out of the "
                "groups with a sphere"
            )
        sound = self._step_on_sphere(param, grad, group)
        state = self.state[param]
        if "skipped" not in state:
            state["skipped"] = torch.zeros((), dtype=torch.int64, device=param.device)
        state["skipped"] += (~sound).sum()

    def _radius(self, param: Tensor, norms: Tensor, sphere: Sphere) -> Tensor:
        """Return the radius of each vector, recording it for vectors not seen before."""
        state = self.state[param]
        if "radius" not in state:
            state["radius"] = torch.zeros_like(norms)
        radius = state["radius"]
        usable = (norms > 0) & norms.isfinite()
        wanted = norms if sphere.radius is None else torch.full_like(norms, sphere.radius)
        radius.copy_(torch.where((radius == 0) & usable, wanted, radius))
        return radius

    def _warn_of_skips(self) -> None:
        if self._told_of_skips:
            return
        counts = [state["skipped"] for state in self.state.values() if "skipped" in state]
        self._steps_unlooked += 1
        on_cpu = all(count.device.type == "cpu" for count in counts)
        if not on_cpu and self._steps_unlooked % _STEPS_BETWEEN_LOOKS != 1:
            return
        total = sum(int(count) for count in counts)
        if total:
            self._told_of_skips = True
            warnings.warn(
                f"{type(self).__name__} left {total} vectors where they were: they are zero and "
                "have no direction, or their gradient is not finite. The running count is "
                "optimizer.skipped; this is said once",
                UserWarning,
                stacklevel=3,
            )


_OF_THE_PARAMS = ("params", "param_names")


def _check_group(group: Group) -> None:
    sphere = group["sphere"]
    if sphere is None:
        return
    if not isinstance(sphere, Sphere):
        raise TypeError(
            f"a group's `sphere` is an onsphere.geometry.Sphere or None, got {sphere!r}"
        )
    for position, param in enumerate(group["params"]):
        if not param.is_floating_point():
            raise ValueError(
                f"parameter {position} of the group has dtype {param.dtype}; weights on a sphere "
                "are real floating point (for complex ones use torch.view_as_real)"
            )
        try:
            sphere.axes.count(param.shape)
        except ValueError as error:
            raise ValueError(f"parameter {position} of the group: {error}") from None


def _encode(sphere: Sphere | None) -> dict[str, Any] | None:
    if sphere is None:
        return None
    return {
        "index": list(sphere.axes.index),
        "pieces": [list(piece) for piece in sphere.axes.pieces],
        "radius": sphere.radius,
    }


def _decode(data: Mapping[str, Any] | Sphere | None) -> Sphere | None:
    if data is None or isinstance(data, Sphere):
        return data
    pieces: Iterable[Iterable[int]] = data["pieces"]
    cut = tuple((axis, count) for axis, count in pieces)
    return Sphere(VectorAxes(tuple(data["index"]), cut), data["radius"])
