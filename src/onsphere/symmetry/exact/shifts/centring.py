"""What takes a constant away, or passes it on: norms, softmax, means, pooling, attention."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from onsphere.symmetry.exact.operation import Operation
from onsphere.symmetry.exact.overloads import flat_tensors
from onsphere.symmetry.exact.rules.normalization import measures_batch
from onsphere.symmetry.exact.shifts.patterns import forbids
from onsphere.symmetry.exact.shifts.products import joined_names
from onsphere.symmetry.exact.shifts.tensor_shift import NO_SHIFT, PLAIN, TensorShift
from onsphere.symmetry.exact.shifts.tracker import Numbers, ShiftRule, ShiftTracker
from onsphere.symmetry.exact.units.field_memory import place_of
from onsphere.symmetry.exact.units.fields import padded


def centres(op: Operation, run: ShiftTracker) -> TensorShift:
    """Forget what is constant along an axis: softmax."""
    ndim = op["self"].ndim
    run.centred(op["self"], [int(op["dim"]) % ndim - ndim])
    return NO_SHIFT


def layer_norm(op: Operation, run: ShiftTracker) -> Sequence[TensorShift]:
    """Forget what is constant along the axes that are normalized."""
    count = len(op["normalized_shape"])
    run.centred(op["input"], range(-count, 0))
    run.vanish(op["weight"])
    return _normalized(op, run.read(op["bias"]), run.read(op["input"]))


def group_norm(op: Operation, run: ShiftTracker) -> Sequence[TensorShift]:
    """Forget what is constant inside a group of channels."""
    given: Tensor = op["input"]
    space = given.ndim - 2
    groups = int(op["group"])
    width = given.shape[1]

    def move(a: NDArray[Any]) -> NDArray[Any]:
        if a.shape[1] == 1:
            return a[:, :, None]
        return a.reshape((a.shape[0], groups, width // groups, *a.shape[2:]))

    by_group = run.read(given).moved(given.ndim, move)
    common = run.unknowns.constant(by_group, [-space - 1, *range(-space, 0)])
    mean = common.moved(given.ndim + 1, lambda a: a.reshape(a.shape[:2]))
    run.vanish(op["weight"])
    bias = run.read(op["bias"]).moved(1, lambda a: a.reshape((-1, *([1] * space))))
    return _normalized(op, bias, mean)


def batch_norm(op: Operation, run: ShiftTracker) -> Sequence[TensorShift]:
    """Forget a constant of each channel, or subtract the running mean."""
    given: Tensor = op["input"]
    space = given.ndim - 2
    mean, var, weight = op.get("running_mean"), op.get("running_var"), op["weight"]
    run.vanish(weight)
    bias, below = (
        run.read(t).moved(1, lambda a: a.reshape((-1, *([1] * space)))) for t in (op["bias"], mean)
    )
    if measures_batch(op):
        run.centred(given, [-given.ndim, *range(-space, 0)])
        saved = run.read(given).moved(given.ndim, lambda a: a.reshape(a.shape[1]))
        return _normalized(op, bias, saved)
    run.vanish(var)
    shift = run.read(given).plus(below, -1)
    statistics = [t for t in (var, weight) if t is not None]
    recipes = [run.recipe(t) for t in statistics]
    for number, part in shift:
        if number != PLAIN or any(r is None for r in recipes):
            run.unknowns.vanish(TensorShift({number: part}))
            continue
        known = [r for r in recipes if r is not None]
        eps = op["eps"] if op.has("eps") else op["epsilon"]
        shape = np.broadcast_shapes(
            *(padded(i, given.ndim).shape for _, i in part.fields.terms),
            (given.shape[1], *([1] * space)),
        )
        gain = f"{joined_names(known[1].names)} / " if weight is not None else "1 / "
        words = f"({gain}sqrt({joined_names(known[0].names)})) * {{}}"
        bias = bias.plus(
            run.image(
                ("batch_norm", *(r.number for r in known), *map(place_of, statistics)),
                part.fields,
                lambda a: padded(a, given.ndim)[..., None],
                shape,
                words,
                partial(_scaled, var, weight, eps, space),
                by_entry=True,
            )
        )
    return _normalized(op, bias)


def _scaled(var: Tensor, weight: Any, eps: float, space: int, given: Numbers) -> Numbers:
    factor = (var.detach().double().cpu() + eps).rsqrt()
    if weight is not None:
        factor = factor * weight.detach().double().cpu()
    return given * factor.numpy().reshape((-1, *([1] * space)))


def _normalized(
    op: Operation, bias: TensorShift, mean: TensorShift = NO_SHIFT
) -> list[TensorShift]:
    """Return what is added to the results of a norm: to what it gives, and to a mean beside it."""
    results = len(flat_tensors(op.result))
    return [bias, mean, *([NO_SHIFT] * results)][:results]


def spreads(op: Operation, run: ShiftTracker) -> Sequence[TensorShift]:
    """Measure a spread, which forgets a constant; a mean beside it moves with it."""
    run.centred(op["self"], _dims(op))
    return [NO_SHIFT, _reduced(op, run.read(op["self"]))]


def averages(op: Operation, run: ShiftTracker) -> TensorShift:
    """Take a mean, or the largest of entries that move together."""
    run.centred(op["self"], _dims(op))
    common = _reduced(op, run.read(op["self"]))
    if op.name == "aten::sum":
        return common.times(int(np.prod([op["self"].shape[a] for a in _dims(op)])))
    return common


def _dims(op: Operation) -> list[int]:
    ndim = op["self"].ndim
    dims = op["dim"] if op.has("dim") else None
    dims = [dims] if isinstance(dims, int) else list(dims if dims is not None else [])
    return [d % ndim - ndim for d in dims or range(ndim)]


def _reduced(op: Operation, shift: TensorShift) -> TensorShift:
    ndim = op["self"].ndim
    if op.has("keepdim") and op["keepdim"]:
        return shift
    dims = _dims(op)
    kept = [d for d in range(ndim) if d - ndim not in dims]
    return shift.moved(ndim, lambda a: a.reshape([a.shape[d] for d in kept]))


def pools(count: int) -> ShiftRule:
    """Return the rule of what takes means, or the largest, of positions: zeros around them show."""

    def rule(op: Operation, run: ShiftTracker) -> TensorShift:
        means = "avg_pool" in op.name and op.has("padding")
        if means and np.any(op.get("padding")) and op.get("count_include_pad"):
            return forbids(op, run)
        if op.has("divisor_override") and op["divisor_override"]:
            return forbids(op, run)
        return run.unknowns.constant(run.read(op.get("self")), range(-count, 0))

    return rule


def attention(op: Operation, run: ShiftTracker) -> Sequence[TensorShift]:
    """Forget what all keys have in common; means of values move as these do."""
    key, value = op["key"], op["value"]
    run.vanish(op["query"])
    run.centred(key, [-2])
    for name in ("attn_mask", "attn_bias"):
        if isinstance(op.get(name), Tensor):
            run.unknowns.constant(run.read(op.get(name)), [-1])
    same = key is value or value is op["query"] or key is op["query"]
    if same or op["dropout_p"] or value.shape[:-2] != op["query"].shape[:-2]:
        run.vanish(key, value)
        return [NO_SHIFT]
    means = run.unknowns.constant(run.read(value), [-2])
    return [means, NO_SHIFT]
