r"""What a tuned recipe does to weights on spheres: param groups and schedules that do the same.

A weight on which the function depends only by direction turns, under an optimizer with weight
decay, by an angle per step that the recipe alone decides once the norm has settled
(:mod:`onsphere.dynamics.equilibrium`). A sphere optimizer that turns it by that angle follows the
same path with no weight decay, and without the wait for the norm. What a schedule of the learning
rate makes of the angle: :mod:`onsphere.planning.rotation_schedule`.

A run that is short beside the time to relax never gets to the balance. A recipe that knows its
length and the norm at its start turns by its mean rotation
(:func:`~onsphere.dynamics.relaxation.mean_rotation`).

Source: Kosson et al., 2023 (arXiv 2305.17212), for rotation as what a recipe sets.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from onsphere._utils.warning import warn
from onsphere.dynamics import Equilibrium
from onsphere.dynamics.optimizers import OPTIMIZERS
from onsphere.dynamics.relaxation import mean_rotation
from onsphere.optim.updates.types import Group
from onsphere.planning import rotation_schedule
from onsphere.planning.rotation_schedule import Schedule

# So many relaxation times, and what is left of the way to the equilibrium is 5%.
_SETTLED = 3


@dataclass(frozen=True)
class SphereRecipe:
    r"""A tuned recipe and what it does to weights; made by :func:`~onsphere.sphere_recipe`.

    Args:
        method: the optimizer's name.
        equilibrium: where it settles; the norm is in no useful unit.
        keywords: arguments of the tuned optimizer, for those of PyTorch and the sphere optimizers
            alike. Ordinary parameters go on with them.
        steps: how long the run lasts; ``None`` for one that settles.
        initial_norm_ratio: the norm at its start in units of the equilibrium's; ``None`` where it
            is not known.
    """

    method: str
    equilibrium: Equilibrium
    keywords: dict[str, Any] = field(hash=False)
    steps: int | None = None
    initial_norm_ratio: float | None = None

    @property
    def rotation(self) -> float:
        """Radians per step: in equilibrium, or on average over a run that is known not to last."""
        return self.rotation_from(self.initial_norm_ratio)

    def rotation_from(self, initial_norm_ratio: float | None) -> float:
        """Return the mean rotation per step of a run that starts at some norm.

        Args:
            initial_norm_ratio: in units of the equilibrium's; ``None`` where it is not known.

        Returns:
            Radians per step; those of the equilibrium without a norm or :attr:`steps`.

        Example:
            >>> import onsphere as osp
            >>> recipe = osp.sphere_recipe("adamw", lr=1e-3, weight_decay=0.1, steps=1000)
            >>> [round(recipe.rotation_from(norm) / recipe.rotation, 2) for norm in (0.5, 1, 5)]
            [1.78, 1.0, 0.21]
        """
        if initial_norm_ratio is None or self.steps is None:
            return self.equilibrium.rotation
        return mean_rotation(float(initial_norm_ratio), self._of_norm_1, self.steps)

    @property
    def _of_norm_1(self) -> Equilibrium:
        return self.equilibrium._replace(norm=1.0)

    def start_of(self, group: Mapping[str, Any]) -> float | None:
        """Return the norm at the start of a group's weights, in units of the equilibrium's.

        Args:
            group: a param group with a sphere.

        Returns:
            :attr:`initial_norm_ratio` where it was given; else what the weights say, for AdamW and
            Lion, whose updates have a known size in every coordinate; else ``None``.
        """
        by_entry = OPTIMIZERS[self.method].norm_of == "entry"
        if self.initial_norm_ratio is not None or self.steps is None or not by_entry:
            return self.initial_norm_ratio
        given = group["params"]
        params = [given] if isinstance(given, Tensor) else [_tensor(param) for param in given]
        entries = sum(param.numel() for param in params)
        if not entries:
            return None
        square = sum(float(param.detach().double().square().sum()) for param in params) / entries
        return math.sqrt(square) / self.equilibrium.norm if square > 0 else None

    @property
    def relaxation(self) -> float:
        r"""Steps after which a small distance from equilibrium is smaller by the factor e."""
        return 1 / self.equilibrium.rate

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.keywords.items())
        return (
            f"{self.method}({given}): turns by {self.rotation:.3g} radians per step, "
            f"settles in some {self.relaxation:,.0f} steps"
        )

    def groups(self, groups: Iterable[Mapping[str, Any]]) -> list[Group]:
        r"""Return param groups for ``SphereSGD`` and ``SphereAdamW``.

        Args:
            groups: as ``audit.param_groups(model)`` gives them; those with a ``sphere`` shall turn.

        Returns:
            The same groups; those on spheres turn by :attr:`rotation` per step, without decay (by
            that of their own start where the recipe knows how long the run lasts:
            :meth:`start_of`). Their ``lr`` is the tuned one, of which ``rotation_scale`` makes the
            rotation, :math:`\propto\sqrt\eta`: any scheduler does to them what it does to the tuned
            run. Use them with :attr:`keywords`: with another momentum the same rotation per step
            is another path.

        Raises:
            TypeError: something else than groups is given.

        Example:
            >>> import torch
            >>> import onsphere as osp
            >>> from onsphere.geometry import Sphere
            >>> weight = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
            >>> recipe = osp.sphere_recipe("sgd", lr=0.1, weight_decay=0.05, momentum=0.0)
            >>> groups = recipe.groups([{"params": [weight], "sphere": Sphere()}])
            >>> optimizer = osp.optim.SphereSGD(groups, **recipe.keywords)
            >>> weight.grad = torch.tensor([0.0, 7.0])
            >>> optimizer.step()
            >>> round(recipe.rotation, 4), round(-torch.atan2(weight[1], weight[0]).item(), 4)
            (0.1, 0.1)
        """
        lr = self.keywords["lr"]
        turning = {"lr": lr, "lr_mode": "angle", "weight_decay": 0.0}
        copied = _checked(groups)
        self._warn_of_a_short_run(copied)
        return [
            {**g, **turning, "rotation_scale": self.rotation_from(self.start_of(g)) / lr**0.5}
            if _on_sphere(g)
            else g
            for g in copied
        ]

    def _warn_of_a_short_run(self, groups: Iterable[Group]) -> None:
        time = math.inf if self.steps is None else self.steps * self.equilibrium.rate
        unknown = any(_on_sphere(group) and self.start_of(group) is None for group in groups)
        if time < _SETTLED and unknown:
            warn(
                f"in {self.steps:,} steps {self.method} does not settle (that takes some "
                f"{_SETTLED * self.relaxation:,.0f}), so its weights do not turn by the angle of "
                "the equilibrium. Give sphere_recipe(initial_norm_ratio=...), the norm at the "
                "start in units of the equilibrium's, which osp.plan and osp.Monitor tell"
            )

    def plain_groups(self, groups: Iterable[Mapping[str, Any]]) -> list[Group]:
        """Return param groups for an optimizer that ``on_sphere(..., mode="rotate")`` shall wrap.

        Args:
            groups: as for :meth:`groups`; give the same ones to ``on_sphere``.

        Returns:
            The same groups, without the entries that only sphere optimizers know.

        Raises:
            TypeError: something else than groups is given.

        Example:
            >>> import torch
            >>> import onsphere as osp
            >>> from onsphere.geometry import Sphere
            >>> weight = torch.nn.Parameter(torch.eye(4, 2))
            >>> groups = [{"params": [weight], "sphere": Sphere()}]
            >>> recipe = osp.sphere_recipe("muon", lr=0.02, weight_decay=0.1)
            >>> base = torch.optim.Muon(recipe.plain_groups(groups), **recipe.keywords)
            >>> optimizer = osp.optim.on_sphere(base, groups, mode="rotate")
            >>> optimizer.param_groups[0]["lr"]  # the tuned rate; the weight turns by
            0.02
            >>> round(optimizer.param_groups[0]["rotation_scale"] * 0.02**0.5 / recipe.rotation, 9)
            1.0
        """
        unknown = ("sphere", "lr_mode")
        return [
            {key: value for key, value in group.items() if key not in unknown}
            for group in self.groups(groups)
        ]

    def schedule(self, factor: Schedule) -> Schedule:
        r"""Turn a schedule of the tuned learning rate into that of the rotation.

        Args:
            factor: step -> :math:`f_t`, what the tuned rate is multiplied by, as ``LambdaLR``
                takes it.

        Returns:
            Step -> :math:`\sqrt{f_t}`: the equilibrium's rotation under that rate. For what the
            tuned run does while its norm lags behind, see :meth:`followed`.

        Raises:
            RecipeError: (when it is called) a factor that is negative or not finite.

        Example:
            >>> import onsphere as osp
            >>> recipe = osp.sphere_recipe("adamw", lr=1e-3, weight_decay=0.1)
            >>> recipe.schedule(lambda step: 0.25)(0)
            0.5
        """
        return rotation_schedule.settled(factor)

    def followed(self, factor: Schedule, initial_norm_ratio: float = 1.0) -> Schedule:
        r"""Turn a schedule of the tuned rate into the rotation of a tuned run, norm and all.

        By the recursion of :mod:`onsphere.planning.rotation_schedule`: a rate that falls quickly
        takes the rotation along, and it comes back to :math:`\sqrt f` as the norm follows.

        Args:
            factor: step -> :math:`f_t`, as for :meth:`schedule`.
            initial_norm_ratio: the norm at step 0 in units of the equilibrium at :math:`f = 1`.

        Returns:
            Step -> :math:`\theta_t/\theta_\infty`. A step costs as many calls of ``factor`` as
            there are steps since the last one that was asked for.

        Raises:
            RecipeError: ``initial_norm_ratio`` is not positive; when it is called, a factor that is
                negative or not finite.

        Example:
            >>> import onsphere as osp
            >>> recipe = osp.sphere_recipe("adamw", lr=0.1, weight_decay=0.1)
            >>> dropped = recipe.followed(lambda step: 0.01)
            >>> [round(dropped(step), 3) for step in (0, 10, 100_000)]
            [0.01, 0.01, 0.1]
        """
        return rotation_schedule.followed(factor, self._of_norm_1, initial_norm_ratio)

    def schedules(
        self, groups: Iterable[Mapping[str, Any]], factor: Schedule, *, follow: bool | None = None
    ) -> list[Schedule]:
        """Return one schedule per param group, as ``LambdaLR`` takes them.

        Args:
            groups: those that the optimizer was made of, with ``sphere`` where there is one.
            factor: the tuned run's schedule, which all groups keep unless they follow the norm:
                a plain ``LambdaLR(optimizer, factor)`` or any other scheduler does the same then.
            follow: on spheres :meth:`followed` instead of :meth:`schedule`. By default where the
                recipe knows how long the run lasts and the norm at its start.

        Returns:
            A list for ``torch.optim.lr_scheduler.LambdaLR(optimizer, ...)``: factors of ``lr``,
            whose root multiplies the rotation.

        Raises:
            TypeError: something else than groups is given.

        Example:
            >>> from onsphere.geometry import Sphere
            >>> groups = [{"params": [], "sphere": Sphere()}, {"params": []}]
            >>> import onsphere as osp
            >>> recipe = osp.sphere_recipe("lion", lr=1e-4, weight_decay=1.0)
            >>> [schedule(0) for schedule in recipe.schedules(groups, lambda step: 0.25)]
            [0.25, 0.25]
        """
        return [
            self._schedule_of(group, factor, follow) if _on_sphere(group) else factor
            for group in _checked(groups)
        ]

    def _schedule_of(self, group: Group, factor: Schedule, follow: bool | None) -> Schedule:
        """Return a schedule of the group's ``lr``, whose root is that of its rotation."""
        start = self.start_of(group)
        if follow is None:
            follow = start is not None
        if not follow:
            return lambda step: rotation_schedule.factor_at(factor, step)
        unit = self.equilibrium.rotation / self.rotation_from(start)
        path = self.followed(factor, 1.0 if start is None else start)
        return lambda step: (unit * path(step)) ** 2


def _checked(groups: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Copy param groups; say so where none of them is on a sphere."""
    copied = []
    for group in groups:
        if not isinstance(group, Mapping):
            raise TypeError(
                "a recipe takes param groups, as audit.param_groups(model) gives them, got a "
                f"{type(group).__name__}; write [{{'params': [...], 'sphere': ...}}]"
            )
        copied.append(dict(group))
    if not any(_on_sphere(group) for group in copied):
        warn("none of these param groups has a sphere, so the recipe changes nothing")
    return copied


def _tensor(param: Any) -> Tensor:
    """Return a parameter that may come with its name."""
    return param[1] if isinstance(param, tuple) else param


def _on_sphere(group: Mapping[str, Any]) -> bool:
    return group.get("sphere") is not None
