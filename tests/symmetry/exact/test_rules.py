"""Every rule against the numbers: the unit it gives is the degree of the operation."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere.symmetry import register_rule
from onsphere.symmetry.exact.operation import Operation
from onsphere.symmetry.exact.rules.taught import TAUGHT
from onsphere.symmetry.exact.trace import trace
from onsphere.symmetry.exact.units.linear_forms import Unit


@dataclass(frozen=True)
class Case:
    """A function of a positive matrix; ``degree`` is None where its unit must be 0."""

    name: str
    function: Callable[[Tensor], Tensor]
    degree: Fraction | int | None


ONE = torch.ones(4, 4)
CASES = (
    Case("mul", lambda w: w * w, 2),
    Case("div", lambda w: w / (w * w), -1),
    Case("mm", lambda w: w @ w @ w, 3),
    Case("pow", lambda w: w**2.5, Fraction(5, 2)),
    Case("rsqrt", lambda w: w.rsqrt(), Fraction(-1, 2)),
    Case("sqrt with eps", lambda w: (w + 1e-6).sqrt(), Fraction(1, 2)),
    Case("clamped norm", lambda w: F.normalize(w, dim=-1), 0),
    Case("hypot with eps", lambda w: w / torch.hypot(w, torch.tensor(1e-3)), 0),
    Case("hypot of two", lambda w: torch.hypot(w, 2 * w), 1),
    Case("hypot with one", lambda w: torch.hypot(w, torch.tensor(1.0)), None),
    Case("a guard", lambda w: torch.where(w > 0, w, torch.ones_like(w)), 1),
    Case("a choice", lambda w: torch.where(w > w.mean(), w, torch.ones_like(w)), None),
    Case("a ramp", lambda w: torch.where(w > 0.1, w, torch.ones_like(w)), None),
    Case("prod", lambda w: w.prod(-1), 4),
    Case("var", lambda w: w.var(-1), 2),
    Case("relu", lambda w: F.relu(w - w.mean()), 1),
    Case("max pool", lambda w: F.max_pool2d(w[None], 2), 1),
    Case("cat with zeros", lambda w: torch.cat([w, torch.zeros(4, 4)]), 1),
    Case("masked with -inf", lambda w: w.masked_fill(w > w.mean(), float("-inf")).amax(-1), 1),
    Case("written in slices", lambda w: _assembled(w), 1),
    Case("sign", lambda w: w.sign(), 0),
    Case("layer norm", lambda w: F.layer_norm(w, (4,)), 0),
    Case("rms norm", lambda w: F.rms_norm(w, (4,)), 0),
    Case("group norm", lambda w: F.group_norm(w[None], 2), 0),
    Case("range norm", lambda w: w / (w.amax() - w.amin()) ** 0.2, Fraction(4, 5)),
    Case("lerp", lambda w: torch.lerp(w, 2 * w, 0.3), 1),
    Case("lerp by a weight", lambda w: torch.lerp(ONE, ONE, w), None),
    Case("inverse", lambda w: torch.linalg.inv(w + 3 * w.diag().diag()), -1),
    Case("gelu", F.gelu, None),
    Case("exp", torch.exp, None),
    Case("softmax", lambda w: w.softmax(-1), None),
    Case("one plus w", lambda w: 1 + w, None),
    Case("an eps that is none", lambda w: F.relu(w + 1e-6) * 2 + w.square().sqrt() - 1e-6, None),
    Case("hardtanh", lambda w: F.hardtanh(w), None),
    Case("a python number", lambda w: w / w.sum().item(), None),
    Case("to integers", lambda w: w * w.long(), None),
)


def _assembled(w: Tensor) -> Tensor:
    out = torch.zeros(4, 4)
    out[:2] = w[:2]
    out[2:] += w[2:]
    return out


class Holder(nn.Module):
    """Gives ``function(weight) * gain``, so that gain trades with the degree of the function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.rand(4, 4, generator=generator) + 0.5)
        self.gain = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weight) * self.gain + 0 * x.sum()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_unit_is_the_degree(case: Case) -> None:
    basis = trace(Holder(case.function), (torch.ones(1),)).basis
    if case.degree is None:
        assert basis == ()
    else:
        (vector,) = basis
        assert vector.get("gain", 0) * 1 == -case.degree * vector["weight"]


@pytest.mark.parametrize("case", [c for c in CASES if c.degree is not None], ids=lambda c: c.name)
def test_degree_agrees_with_the_numbers(case: Case) -> None:
    w = torch.rand(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    torch.set_default_dtype(torch.float64)
    try:
        expected = case.function(w) * 3.0 ** float(case.degree or 0)
        torch.testing.assert_close(case.function(3 * w), expected, rtol=1e-2, atol=1e-2)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_operation_without_a_rule_pins_its_inputs_and_is_listed() -> None:
    found = trace(Holder(lambda w: torch.special.i1(w)), (torch.ones(1),))
    assert found.basis == ()
    assert [u.name for u in found.unknown] == ["aten::special_i1"]


def test_a_user_registers_a_rule() -> None:
    @register_rule("aten::special_i1")
    def _degree_two(op: Operation) -> Unit:
        return op.unit(op["self"]) * 2

    try:
        (vector,) = trace(Holder(lambda w: torch.special.i1(w)), (torch.ones(1),)).basis
        assert vector == {"weight": 1, "gain": -2}
    finally:
        del TAUGHT.rules["aten::special_i1"]
