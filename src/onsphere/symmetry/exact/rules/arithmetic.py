"""Rules of operations that fit no pattern: sums with an eps, powers, choices, products with a bias.

Each is a function from an operation to the unit of its result, with its demands on the way; the
table in :mod:`onsphere.symmetry.exact.rules.table` says which operation follows which.
"""

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from onsphere.symmetry.exact.eps_sites import LARGEST_EPS
from onsphere.symmetry.exact.operation import (
    Operation,
    Origin,
    Rule,
    is_free_number,
    same_view,
)
from onsphere.symmetry.exact.overloads import flat_tensors, is_float
from onsphere.symmetry.exact.units.linear_forms import ANY, ZERO, Unit


def add(op: Operation) -> Unit:
    """Add with equal units; a small constant may turn out to be an eps."""
    self, other = op["self"], op["other"]
    if op.small("other") and isinstance(self, Tensor):
        return op.with_eps(op.unit(self), "other")
    if op.small("self") and isinstance(other, Tensor):
        return op.with_eps(op.unit(other), "self")
    if isinstance(self, Tensor) and isinstance(other, Tensor) and op["alpha"] == 1:
        return _of_two(op, self, other)
    common = op.equal(self, other)
    if op.name in ("aten::sub", "aten::rsub") and not isinstance(other, Tensor):
        unit = op.unit(self)
        return Unit(unit.terms, unit.free, unit.binary and other == 1, fields=unit.fields)
    return common


def _of_two(op: Operation, self: Tensor, other: Tensor) -> Unit:
    """Add or subtract two tensors. ``x + (y - x)`` is ``y``, and ``x - x`` is 0.

    Straight-through estimators are written so, the difference detached.
    """
    ledger = op.ledger
    if op.name.startswith("aten::add"):
        for difference, added in ((self, other), (other, self)):
            unit = ledger.read(difference)
            if ledger.cancels(unit, added):
                return Unit(unit.terms, fields=unit.fields)
    elif op.name.startswith("aten::sub") and self.shape == other.shape:
        if same_view(self, other):
            return ANY
        above, below = op.unit(self), op.unit(other)
        sides = above - below
        differ = sides.fields or ledger.constraints.reduced(sides.terms)
        if differ and not above.free and not below.free and other.is_floating_point():
            return ledger.add_difference(above, other, sides)
    return op.equal(self, other)


def hypot(op: Operation) -> Unit:
    """Join the legs of a right triangle; the square of a small constant one may be an eps."""
    self, other = op["self"], op["other"]
    eps = op.small("other", LARGEST_EPS**0.5)
    return op.with_eps(op.unit(self), "other") if eps else op.equal(self, other)


def mul(op: Operation) -> Unit:
    """Multiply; 0-or-1 times an infinity holds only 0 and infinities."""
    left, right = op.unit(op["self"]), op.unit(op["other"])
    if left.guard and right.guard:
        return both(op)
    if isinstance(op["self"], Tensor) and isinstance(op["other"], int | float):
        vanishes = op["other"] == 0 or left.free or (right.free and left.binary)
        return ANY if vanishes else Unit(left.terms, fields=left.fields)
    return left + right


def div(op: Operation) -> Unit:
    """Divide; an eps in the denominator is one. Rounded quotients need equal units."""
    top, bottom = op["self"], op["other"]
    if op.get("rounding_mode") is not None or op.name == "aten::floor_divide":
        op.equal(top, bottom)
        return ZERO
    below = op.unit(bottom, keep_eps=True)
    return op.unit(top) - (ZERO if below.free else below)


def power(op: Operation) -> Unit:
    """Multiply the unit by a constant exponent; a root or an inverse may hold an eps."""
    exponent = op["exponent"]
    if not isinstance(exponent, int | float) or not isinstance(op["self"], Tensor):
        return op.dimensionless(*op.tensors())
    if exponent == 0:
        return ZERO
    rational = Fraction(exponent).limit_denominator(1000)
    if abs(float(rational) - exponent) > 1e-12:
        return op.dimensionless(*op.tensors())
    return op.unit(op["self"], keep_eps=exponent < 1) * rational


def root(exponent: Fraction | int) -> Rule:
    """Return the rule of a fixed power."""

    def rule(op: Operation) -> Unit:
        return op.unit(op["self"], keep_eps=exponent < 1) * exponent

    return rule


def clamp(op: Operation) -> Unit:
    """Clamp at 0 or at nothing: keeps the unit. At a small number: maybe an eps. Else equal."""
    low, high = op.get("min"), op.get("max")
    if high is None and op.small("min"):
        return op.with_eps(op.unit(op["self"]), "min")
    return op.equal(op["self"], *(_bound(op, x) for x in (low, high)))


def _bound(op: Operation, number: Any) -> Any:
    """Return what a bound means: the extremes of float16 are infinite in float16 alone."""
    halves = isinstance(number, int | float) and abs(number) == torch.finfo(torch.float16).max
    return ZERO if halves and op["self"].dtype != torch.float16 else number


def maximum(op: Operation) -> Unit | tuple[Unit, ...]:
    """Take the larger of two, or the largest along an axis: a small constant may be an eps."""
    if not isinstance(op.get("other"), Tensor):
        return (op.unit(op["self"], keep_eps=True), ZERO)
    for constant, tensor in (("other", "self"), ("self", "other")):
        if op.small(constant):
            return op.with_eps(op.unit(op.get(tensor)), constant)
    return op.equal(op["self"], op.get("other"))


def where(op: Operation) -> Unit:
    """Choose between two values of equal units; a guard that never acts chooses only one."""
    if op.get("self") is None:
        return ZERO
    chosen = op.settled(op["condition"])
    if chosen is not None:
        return op.unit(op.get("self") if chosen else op.get("other"))
    return op.equal(op.get("self"), op.get("other"))


def fill(op: Operation) -> Unit:
    """Write a constant over part of a tensor; a guard that never acts writes nothing."""
    if op.settled(op.get("mask")) is False:
        return op.unit(op["self"])
    return op.equal(op["self"], op["value"] if op.has("value") else op["fill_value"])


def full(op: Operation) -> Unit:
    """Make a constant."""
    return op.unit(op["fill_value"] if op.has("fill_value") else op["value"])


def pad(op: Operation) -> Unit:
    """Pad with a constant: 0 fits any unit."""
    return op.equal(op["self"], op["value"])


def replace(op: Operation) -> Unit:
    """Write numbers in the place of what is none; 0, and what is not given, fits any unit."""
    return op.equal(op["self"], *(op[name] or 0.0 for name in ("nan", "posinf", "neginf")))


def between(op: Operation) -> Unit:
    """Go in even steps from one number, or tensor, to another of its unit."""
    return op.equal(op["start"], op["end"])


def distance(op: Operation) -> Unit:
    """Measure a distance: a common unit, except for the count of different entries."""
    common = op.equal(op["self"], op["other"])
    return ZERO if op["p"] == 0 else common


def cast(op: Operation) -> Unit:
    """Change dtype or device; booleans become numbers 0 and 1."""
    self: Tensor = op["self"]
    if self.dtype == torch.bool:
        return Unit(binary=True)
    if not is_float(op.result):
        return op.dimensionless(self)
    return op.unit(self, keep_eps=True)


def copy(op: Operation) -> Unit:
    """Copy: the unit of the source, which whole numbers do not keep."""
    if not is_float(op["self"]):
        return op.dimensionless(op.get("src"))
    return op.unit(op.get("src"), keep_eps=True)


def bias_product(*factors: str) -> Rule:
    """Return the rule of ``self + product of factors``, as in addmm."""

    def rule(op: Operation) -> Unit:
        product = ZERO
        for name in factors:
            product = product + op.unit(op.get(name))
        return product if op.get("beta") == 0 else op.equal(op["self"], product)

    return rule


def addcdiv(op: Operation) -> Unit:
    """Add a quotient."""
    return op.equal(op["self"], op.unit(op["tensor1"]) - op.unit(op["tensor2"], keep_eps=True))


def convolution(op: Operation) -> Unit:
    """Multiply input and weight, add the bias."""
    product = op.unit(op["input"] if op.has("input") else op["self"]) + op.unit(op["weight"])
    return product if op["bias"] is None else op.equal(product, op["bias"])


def attention(op: Operation) -> tuple[Unit, ...]:
    """Softmax attention: scores have unit 0, the result has the values' unit."""
    op.dimensionless(op.unit(op["query"]) + op.unit(op["key"]))
    for name in ("attn_mask", "attn_bias"):
        if isinstance(op.get(name), Tensor):
            op.dimensionless(op.get(name))
    values = op.unit(op["value"])
    return (values, *(ZERO for _ in range(15)))


def product_reduce(op: Operation) -> Unit:
    """Multiply entries together: the unit times their number."""
    self: Tensor = op["self"]
    count = self.shape[op.get("dim")] if op.get("dim") is not None else self.numel()
    return op.unit(self) * int(count)


def first_of(rule: Rule) -> Rule:
    """Return a rule whose first result follows ``rule`` and whose others are indices or counts."""

    def several(op: Operation) -> tuple[Unit, ...]:
        unit = rule(op)
        return (unit if isinstance(unit, Unit) else unit[0], *(ZERO for _ in range(7)))

    return several


def compare(op: Operation) -> Unit:
    """Compare values of equal units: true or false. With 0 or infinity it makes a guard."""
    self, other = op.get("self"), op.get("other")
    op.equal(self, other)
    if self is other:
        return Unit(guard=True)
    computed = isinstance(self, Tensor) and bool(op.ledger.origin(self) & Origin.WEIGHTS)
    whole = not isinstance(self, Tensor) or not self.is_floating_point()
    constant = not isinstance(other, Tensor) and is_free_number(other)
    return Unit(guard=computed and constant and not whole)


def both(op: Operation) -> Unit:
    """Join conditions; two guards make one."""
    masks = flat_tensors([op["self"], op["other"]])
    return Unit(guard=all(op.ledger.read(m).guard for m in masks))


def bins(op: Operation) -> Unit:
    """Compare with places of equal unit; results: indices."""
    op.equal(op["self"], op["boundaries"] if op.has("boundaries") else op["sorted_sequence"])
    return ZERO


def draw(op: Operation) -> Unit:
    """Draw random numbers; where tensors say how likely they are, these know a scale."""
    told = [op.get(n) for n in ("p", "mean", "std") if isinstance(op.get(n), Tensor)]
    by_shape = op.name.endswith("_") or isinstance(op.get("p"), float)
    if op.has("self") and not by_shape:
        told.append(op["self"])
    return op.dimensionless(*told)


def item(op: Operation) -> Unit:
    """Turn a tensor into a Python number, which carries no unit: it must be 0."""
    if op["self"].is_floating_point():
        op.ledger.note_read(op["self"])
    return ZERO


def leaky(op: Operation) -> Unit:
    """Scale negative entries by a weight of unit 0."""
    op.dimensionless(op["weight"])
    return op.unit(op["self"])


def hardtanh(op: Operation) -> Unit:
    """Clamp between two numbers."""
    return op.equal(op["self"], _bound(op, op["min_val"]), _bound(op, op["max_val"]))


def threshold(op: Operation) -> Unit:
    """Replace what lies below a number."""
    return op.equal(op["self"], op["threshold"], op["value"])


def vector_norm(op: Operation) -> Unit:
    """Take a norm: the unit itself, except for the count of non-zeros."""
    order = op["ord"] if op.has("ord") else op["p"]
    if order == 0:
        return ZERO
    return op.unit(op["self"], keep_eps=False)


def lerp(op: Operation) -> Unit:
    """Mix two values of equal units with a weight of unit 0."""
    op.dimensionless(op["weight"])
    return op.equal(op["self"], op["end"])


def polar(op: Operation) -> Unit:
    """Join a length with an angle."""
    op.dimensionless(op["angle"])
    return op.unit(op["abs"])


def index_add(op: Operation) -> Unit:
    """Write or add a source into part of a tensor."""
    if op.get("reduce") in ("multiply", "prod"):
        return op.dimensionless(*op.tensors())
    for name in ("source", "src", "values", "value"):
        if op.has(name):
            return op.equal(op["self"], op[name])
    return op.equal(op["self"])


def bent_backward(op: Operation) -> Unit:
    """Pass a gradient where a value lies on one side of a number; 0 fits any unit."""
    op.equal(op["self"], op["threshold"])
    return op.unit(op["grad_output"])


def pinned_backward(op: Operation) -> Unit:
    """Pass a gradient back through a function that knows a scale."""
    names = ("self", "output", "self_or_result")
    op.dimensionless(*(op.get(n) for n in names if isinstance(op.get(n), Tensor)))
    return op.unit(op["grad_output"])


def convolution_backward(op: Operation) -> tuple[Unit, ...]:
    """Pass a gradient back to input, weight and bias."""
    grad = op.unit(op["grad_output"])
    return (grad + op.unit(op["weight"]), grad + op.unit(op["input"]), grad)


def squared_difference(op: Operation) -> Unit:
    """Compare prediction and target by their squared difference."""
    return op.equal(op["self"], op["target"]) * 2


def nll_loss(op: Operation) -> tuple[Unit, ...]:
    """Pick what a target names; a mean over weights forgets their unit, a sum does not."""
    weight = op.unit(op["weight"]) if isinstance(op["weight"], Tensor) else ZERO
    total = op.unit(op["self"])
    return (total if op["reduction"] == 1 else total + weight, weight)


def cross_entropy(op: Operation) -> Unit:
    """Compare probabilities or logits of unit 0, times the weights of the loss."""
    positive = [op.get("pos_weight")] if isinstance(op.get("pos_weight"), Tensor) else []
    op.dimensionless(op["self"], op["target"], *positive)
    return op.unit(op["weight"]) if isinstance(op["weight"], Tensor) else ZERO


def pad_packed(op: Operation) -> tuple[Unit, ...]:
    """Lay sequences side by side again, with a constant where one has ended."""
    return (op.equal(op["data"], op["padding_value"]), ZERO)


def embedding_bag(op: Operation) -> tuple[Unit, ...]:
    """Sum rows of a table, weighted or not; results: sums, and counts."""
    unit = op.unit(op["weight"])
    if isinstance(op["per_sample_weights"], Tensor):
        unit = unit + op.unit(op["per_sample_weights"])
    return (unit, ZERO, ZERO, ZERO)


def linear_solve(op: Operation) -> tuple[Unit, ...]:
    """Solve ``A X = B``."""
    below = op.unit(op["A"])
    return (op.unit(op["B"]) - below, below, ZERO, ZERO)


def svd(op: Operation) -> tuple[Unit, ...]:
    """Split into rotations and singular values."""
    return (ZERO, op.unit(op["A"]), ZERO)


def inverse(op: Operation) -> tuple[Unit, ...]:
    """Invert a matrix."""
    return (op.unit(op["A"]) * -1, ZERO)
