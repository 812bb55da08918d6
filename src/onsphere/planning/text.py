"""A plan in sentences: whether the run is long enough, what its schedule does, what to mind."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from onsphere.dynamics.trajectory import Path
from onsphere.planning.compare import LayerComparison
from onsphere.planning.plan import Plan

FORGOTTEN, SHORT = 0.05, 0.5
"""Parts of the start that are left: less than the first is settled, more than the second is not."""

_FOLLOWS = 0.8
"""A rotation below this part of what the present rate would settle at lags behind the rate."""

_NEAR, _NAMED = 0.15, 5
"""A layer within the first of its expectation is near; a sentence names so many at most."""

_NETWORKS = {
    "sgd": "about 3% less (SGD)",
    "adamw": "6 to 9% less (AdamW)",
    "lion": "13 to 24% less (Lion)",
}
_RAISED = {2: "²", 3: "³", 4: "⁴"}


def heading(plan: Plan) -> str:
    """Return the settings in one line.

    Args:
        plan: what was planned.

    Example:
        >>> from onsphere.planning import Schedule
        >>> from onsphere.planning.plan import plan
        >>> heading(plan("sgd", Schedule(1000), lr=0.1, weight_decay=5e-4, momentum=0.9))
        'sgd, lr 0.1, weight decay 0.0005, momentum 0.9: 1,000 steps, constant rate'
    """
    options = {name: value for name, value in plan.settings.items() if name in _SHOWN}
    said = [f"{name} {_SHOWN[name](value)}" for name, value in options.items()]
    said += [name for name in ("nesterov", "decoupled") if plan.settings.get(name)]
    shape = [f"shape {'x'.join(map(str, plan.shape))}"] if plan.shape else []
    batch = [f"batch {plan.batch_size:,}"] if plan.batch_size else []
    first = [plan.method, f"lr {plan.lr:g}", f"weight decay {plan.weight_decay:g}"]
    return ", ".join([*first, *said, *shape, *batch]) + f": {plan.schedule}"


_SHOWN: dict[str, Callable[[Any], str]] = {
    "betas": lambda betas: f"{betas[0]:g} {betas[1]:g}",
    "momentum": lambda momentum: f"{momentum:g}",
}


def quantities(plan: Plan) -> list[tuple[str, str, str]]:
    """Return name, value and unit of what the run settles at; nothing without decay.

    Args:
        plan: what was planned.

    Returns:
        One row per quantity. A value that depends on the unknown L is a multiple of its power.
    """
    if plan.settled is None:
        return []
    steps, depends = plan.half_life or math.nan, plan.depends
    rows = [
        ("rotation", _times(plan.settled.rotation, depends.rotation), "radians per step"),
        ("norm", _times(plan.settled.norm, depends.norm), _unit(plan)),
        (
            "half-life",
            _times(steps, depends.half_life, whole=True),
            f"steps, of {_norm(plan)}",
        ),
    ]
    if plan.batch_size is not None:
        examples = _times(steps * plan.batch_size, depends.half_life, whole=True)
        rows.append(("", examples, f"examples, in batches of {plan.batch_size:,}"))
    return rows


def findings(plan: Plan) -> list[str]:
    """Return what the run will do, a sentence or two each; whether it is long enough first.

    Args:
        plan: what was planned.
    """
    return [*_long_enough(plan), *_growth(plan), *_start(plan), *_schedule(plan), *_batch(plan)]


def lifetimes(plan: Plan) -> str:
    """Return how many half-lives the run lasts; empty where there are none.

    Args:
        plan: what was planned.
    """
    if plan.settled is None or plan.path is None:
        return ""
    left = float(plan.path.left[-1])
    count = -math.log2(left) if left > 0 else math.inf
    return f"{count:,.1f} half-lives" if count < 1000 else "over 1,000 half-lives"


def notes(plan: Plan) -> list[str]:
    """Return what to mind: what is not known, and where the laws are weak.

    Args:
        plan: what was planned.
    """
    return [*_unknown(plan), *_weak(plan)]


def _long_enough(plan: Plan) -> Iterator[str]:
    path = plan.path
    if plan.settled is None or path is None:
        return
    left = float(path.left[-1])
    spent = f"the run lasts {lifetimes(plan)} of {_norm(plan)}"
    settled = path.first(path.left <= FORGOTTEN)
    if settled is not None:
        yield (
            f"Long enough to settle: {spent}. From step {settled:,} on "
            f"({settled / plan.schedule.steps:.0%} of the run) less than {FORGOTTEN:.0%} of the "
            "start is left."
        )
    elif left <= SHORT:
        yield (
            f"Hardly long enough to settle: {spent}, and at its end {left:.0%} of the start is "
            "left."
        )
    else:
        yield (
            f"Too short to settle: {spent}, and at its end {left:.0%} of the start is left. The "
            "initial norm sets how fast the weight turns, more than the decay does; on the sphere "
            "it turns by the equilibrium's angle from the first step."
        )


def _growth(plan: Plan) -> Iterator[str]:
    path = plan.path
    if plan.settled is not None or path is None:
        return
    power, slope = plan.motion.power, plan.motion.slope
    falls = "t^(-1/2)"
    yield (
        f"Without weight decay there is no equilibrium: at a constant rate the norm grows as "
        f"t^(1/{power}) and the rotation falls as {falls}, as long as the run lasts."
    )
    start, end = float(path.norm[0]), float(path.norm[-1])
    if plan.initial_norm is None:
        yield (
            "The initial norm is not given: what is shown is a weight that has outgrown it, the "
            "fastest that a weight can turn. Then neither rate nor gradients matter, only the "
            f"schedule: by {path.rotation[-1]:.3g} radians at the last step."
        )
        return
    twice = path.first(path.norm**power >= 2 * start**power)
    outgrown = (
        f"its start is outgrown (half of {_norm(plan)} is new) at step {twice:,}"
        if twice is not None
        else f"most of {_norm(plan)} is still the start's"
    )
    yield (
        f"The norm grows from {start:.3g} to {end:.3g}; {outgrown}. That alone divides the "
        f"effective learning rate by {(end / start) ** slope:.3g}."
    )


def _start(plan: Plan) -> Iterator[str]:
    path, settled = plan.path, plan.settled
    if path is None or settled is None or plan.initial_norm is None:
        return
    ratio = plan.initial_norm / settled.norm
    fast = ratio**-plan.motion.slope
    how = f"{fast:.3g} times as fast as" if abs(fast - 1) > 0.005 else "as fast as"
    yield (
        f"It starts at {ratio:.3g} times the norm of the equilibrium, so that at the same rate it "
        f"turns {how} there."
    )


def _schedule(plan: Plan) -> Iterator[str]:
    path, kind = plan.path, plan.schedule.kind
    if path is None or plan.settled is None or kind == "constant":
        return
    late = path.steps >= plan.schedule.warmup
    if kind == "step":
        yield from _drops(plan, path)
        return
    behind = late & (path.factors < 1) & (path.rotation < _FOLLOWS * path.balance)
    step = path.first(behind)
    if step is None:
        yield (
            "The norm follows the rate: the rotation stays within "
            f"{1 - _FOLLOWS:.0%} of what each rate would settle at."
        )
        return
    yield (
        f"From step {step:,} on ({step / plan.schedule.steps:.0%} of the run) the rate falls "
        "faster than the norm follows: the rotation falls with the rate, not with its square "
        f"root, and is below {_FOLLOWS:.0%} of what each rate would settle at."
    )


def _drops(plan: Plan, path: Path) -> Iterator[str]:
    for drop in sorted(set(plan.schedule.drops)):
        place = int(torch.searchsorted(path.steps, drop))
        before, at = float(path.rotation[place - 1]), float(path.rotation[place])
        back = path.first((path.steps >= drop) & (path.rotation >= (1 - FORGOTTEN) * path.balance))
        later = [d for d in plan.schedule.drops if d > drop]
        end = min(later, default=plan.schedule.steps)
        recovers = (
            f"is back to {float(path.balance[place]):.3g}, what the new rate settles at, by step "
            f"{back:,}"
            if back is not None and back < end
            else f"is not back to {float(path.balance[place]):.3g}, what the new rate settles at, "
            f"{'when the run ends' if end == plan.schedule.steps else 'before the next drop'}"
        )
        yield (
            f"At step {drop:,} the rotation falls from {before:.3g} to {at:.3g} at once, and "
            f"{recovers}."
        )


def _batch(plan: Plan) -> Iterator[str]:
    if plan.batch_size is None or plan.settled is None or plan.method == "adam":
        return
    yield (
        f"At k times the batch of {plan.batch_size:,}, lr * weight_decay times k keeps half-life "
        "and turning per example: the angles of noisy steps add by their squares."
    )


def _unknown(plan: Plan) -> Iterator[str]:
    depends = plan.depends
    if depends.rotation:
        yield (
            "Adam with its decay in the gradient turns each weight by an angle that depends on L, "
            "the mean of |w|² |gradient|² (without --shape: of mean squares of entries). Give "
            "--gradient-square L and --shape for numbers, or use adamw, where it does not."
        )
    elif depends.norm:
        yield (
            "Norms depend on L, the mean of |w|² |gradient|², and are for L = 1; give "
            "--gradient-square L for yours. Rotation, half-life and everything said of the run do "
            "not depend on it."
        )
    if plan.settled is not None and plan.path is not None and plan.initial_norm is None:
        yield (
            "No --initial-norm is given: the run is shown from the norm of the equilibrium on, and "
            "on a page (--html) also the range from half to twice that norm."
        )


def _weak(plan: Plan) -> Iterator[str]:
    if plan.method in _NETWORKS and plan.settled is not None:
        yield (
            "The laws take gradients for noise; networks that were measured turned "
            f"{_NETWORKS[plan.method]}."
        )
    memory = _memory(plan)
    time = None if plan.half_life is None or plan.depends.half_life else plan.half_life
    if time is not None and memory > time:
        yield (
            f"The optimizer remembers some {memory:,.0f} gradients and the norm moves in "
            f"{time:,.0f} steps: the laws want the first to be the smaller. Where the norm moves, "
            "they are off."
        )
    if plan.method == "muon":
        shape = (
            "" if plan.shape else " Square matrices turn 16% faster than long ones: give --shape."
        )
        yield (
            "The norm is that of torch.optim.Muon with exactly orthogonal steps; its own five "
            f"iterations end at singular values near 0.87, and so does the norm.{shape}"
        )
    if plan.method == "adam" and plan.settled is not None and plan.unit_gradient_square:
        share = plan.weight_decay * plan.settled.norm**2 / math.sqrt(plan.unit_gradient_square)
        if share > 0.1:
            yield (
                f"The decay is {share:.0%} of the gradient in equilibrium; the law wants it to be "
                "a small part."
            )


def _memory(plan: Plan) -> float:
    """Return how many gradients the optimizer's slowest average holds."""
    kept = plan.settings.get("betas", (plan.settings.get("momentum", 0.0),))
    return float(1 / (1 - max(kept)))


def _norm(plan: Plan) -> str:
    return f"|w|{_RAISED[plan.motion.power]}"


def _unit(plan: Plan) -> str:
    if plan.norm_unit == "norm":
        return (
            f"of the {'weight' if not plan.shape else '×'.join(map(str, plan.shape)) + ' weight'}"
        )
    return plan.norm_unit


def _times(value: float, power: float, *, whole: bool = False) -> str:
    """Write a value, and the power of L that it is multiplied by."""
    shown = f"{value:,.0f}" if whole and value >= 10 else f"{value:.3g}"
    if not power:
        return shown
    sign = "-" if power < 0 else ""
    return f"{shown} L^({sign}1/{round(1 / abs(power))})"


def comparison_findings(layers: Sequence[LayerComparison]) -> list[str]:
    """Return what a comparison of measured and expected shows, layers far off first.

    Args:
        layers: of a watched run.
    """
    known = [layer for layer in layers if not math.isnan(layer.off[1])]
    said = []
    if known:
        rotations = [layer.off[1] for layer in known]
        near = sum(abs(off) <= _NEAR for off in rotations)
        said.append(
            f"{near} of {len(known)} layers turn within {_NEAR:.0%} of what their hyperparameters "
            "let expect, over the last half of the run."
        )
        far = [layer for layer in known if abs(layer.off[1]) > _NEAR]
        far.sort(key=lambda layer: -abs(layer.off[1]))
        said += [
            f"{layer.name} turns by {layer.late[2]:.3g} per step, {abs(layer.off[1]):.0%} "
            f"{'more' if layer.off[1] > 0 else 'less'} than what is expected"
            + (f" (flagged by the monitor: {', '.join(layer.flags)})." if layer.flags else ".")
            for layer in far[:_NAMED]
        ]
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if not layer.law:
            reasons.setdefault(layer.why, []).append(layer.name)
    for why, names in reasons.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        said.append(f"Without an expectation ({why}): {', '.join(names[:_NAMED])}{more}.")
    return said
