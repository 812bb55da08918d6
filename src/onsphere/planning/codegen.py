"""A plan as something to copy: the lines of code that move it to the sphere, and its command."""

from collections.abc import Mapping
from typing import Any

from onsphere.dynamics.optimizers import settings_of
from onsphere.dynamics.schedule import Schedule
from onsphere.planning.plan import Plan

_GROUPS = "groups = audit.param_groups(model, weight_decay={decay!r})"
_MATRICES = 'groups = [group for group in audit.param_groups(model) if group["sphere"]]'
_SPHERE = {
    "sgd": "optimizer = osp.optim.SphereSGD(recipe.groups(groups), **recipe.keywords)",
    "adamw": "optimizer = osp.optim.SphereAdamW(recipe.groups(groups), **recipe.keywords)",
    "lion": "base = osp.dynamics.Lion(recipe.plain_groups(groups), **recipe.keywords)",
    "muon": "base = torch.optim.Muon(recipe.plain_groups(groups), **recipe.keywords)",
}
_WRAP = 'optimizer = osp.optim.on_sphere(base, groups, mode="rotate")'


def recipe_code(plan: Plan) -> list[str]:
    """Return the lines, for the ``groups`` that ``audit.param_groups(model)`` gives.

    Args:
        plan: what was planned.

    Returns:
        Three lines of Python, one more where an optimizer is wrapped, three for a schedule; none
        where no one rotation is the same as the plan.

    Example:
        >>> from onsphere.planning import Schedule, plan
        >>> for line in recipe_code(plan("sgd", Schedule(100), lr=0.1, weight_decay=0.01)):
        ...     print(line)
        groups = audit.param_groups(model, weight_decay=0.01)
        recipe = osp.sphere_recipe("sgd", lr=0.1, weight_decay=0.01)
        optimizer = osp.optim.SphereSGD(recipe.groups(groups), **recipe.keywords)
    """
    if plan.recipe is None:
        return []
    given = _written(_options(plan.method, plan.settings))
    numbers = f"lr={plan.lr!r}, weight_decay={plan.weight_decay!r}"
    lines = [
        _MATRICES if plan.method == "muon" else _GROUPS.format(decay=plan.weight_decay),
        f'recipe = osp.sphere_recipe("{plan.method}", {numbers}{given})',
        _SPHERE[plan.method],
    ]
    if plan.method in ("lion", "muon"):
        lines.append(_WRAP)
    if plan.schedule.kind != "constant" or plan.schedule.warmup:
        lines += _schedule_lines(plan)
    return lines


def command_of(plan: Plan) -> str:
    """Return the command line of a plan.

    Args:
        plan: what was planned.

    Example:
        >>> from onsphere.planning import Schedule, plan
        >>> command_of(plan("adamw", Schedule(100, "cosine"), lr=1e-3, weight_decay=0.1))
        'onsphere plan adamw --lr 0.001 --weight-decay 0.1 --steps 100 --schedule cosine'
    """
    given: dict[str, Any] = {"lr": plan.lr, "weight_decay": plan.weight_decay}
    given |= {n: v for n, v in _options(plan.method, plan.settings).items() if n != "shape"}
    given["steps"] = plan.schedule.steps
    if plan.schedule.kind != "constant":
        given["schedule"] = plan.schedule.kind
    given |= _schedule_options(plan.schedule)
    beside = ("initial_norm", "unit_gradient_square", "batch_size")
    given |= {name: getattr(plan, name) for name in beside if getattr(plan, name) is not None}
    if plan.shape:
        given["shape"] = "x".join(map(str, plan.shape))
    return " ".join(["onsphere plan", plan.method, *(_flag(n, v) for n, v in given.items())])


def _flag(name: str, value: Any) -> str:
    word = _FLAGS.get(name, name).replace("_", "-")
    if isinstance(value, bool):
        return f"--{word}" if value else f"--no-{word}"
    return f"--{word} {','.join(map(str, value)) if isinstance(value, tuple) else value}"


_FLAGS = {"unit_gradient_square": "gradient_square", "batch_size": "batch"}


def _schedule_options(schedule: Schedule) -> dict[str, Any]:
    """Return the options of a schedule that are not its defaults."""
    defaults = Schedule(schedule.steps)
    names = ("warmup", "final", "cooldown", "drops", "drop_by")
    return {n: getattr(schedule, n) for n in names if getattr(schedule, n) != getattr(defaults, n)}


def _schedule_lines(plan: Plan) -> list[str]:
    schedule = plan.schedule
    given = _written(_schedule_options(schedule))
    return [
        f'schedule = osp.planning.Schedule({schedule.steps}, "{schedule.kind}"{given})',
        "schedules = recipe.schedules(groups, schedule)",
        "scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)",
    ]


def _options(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not the defaults."""
    defaults = settings_of(method, 0.0, 0.0, {})
    return {name: value for name, value in settings.items() if value != defaults[name]}


def _written(options: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in options.items())
