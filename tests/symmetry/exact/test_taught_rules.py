"""Rules of operations outside the library: what they give, and what is said of wrong ones."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn

import onsphere as osp
from onsphere.symmetry import Kind, RuleError, register_rule
from onsphere.symmetry.exact import Operation, Unit, multiplies, passes, pins, trace
from onsphere.symmetry.exact.rules.table import RULES
from onsphere.symmetry.exact.rules.taught import TAUGHT
from onsphere.symmetry.rewrite.verification import outputs_in_float64, wide_state


def _scaled_relu(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).relu()


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    c, s = angle.cos(), angle.sin()
    return torch.cat([a * c - b * s, a * s + b * c], -1)


def _rms(x: Tensor, g: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * g


def _rms_above(x: Tensor, g: Tensor, least: float, eps: float) -> Tensor:
    """The same of tokens with an entry that is large enough, by a constant that is no eps."""
    return _rms(x, g, eps) * (x.abs().amax(-1, keepdim=True) > least)


def _defined(name: str, function: Callable[..., Tensor]) -> None:
    """Make an operation of a function, with a derivative written by hand."""
    op = library.custom_op(f"taught::{name}", function, mutates_args=())
    op.register_fake(function)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
        ctx.rest = [a for a in inputs if not isinstance(a, Tensor)]

    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            held = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            found = torch.autograd.grad(function(*held, *ctx.rest), held, slope)
        return (*found, *(None for _ in ctx.rest))

    op.register_autograd(backward, setup_context=setup)


FUNCTIONS = {
    "scaled_relu": _scaled_relu, "rotate": _rotate, "myrms": _rms, "my_norm": _rms,
    "rms_above": _rms_above,
}  # fmt: skip
for _name, _function in FUNCTIONS.items():
    _defined(_name, _function)


class Net(nn.Module):
    """Uses three operations of its own, or the same in plain PyTorch."""

    def __init__(self, plain: bool = False, norm: str = "myrms") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.w, self.angle = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(4))
        self.g, self.c = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)
        self.plain, self.norm = plain, norm

    def forward(self, x: Tensor) -> Tensor:
        def op(name: str) -> Callable[..., Tensor]:
            return FUNCTIONS[name] if self.plain else getattr(torch.ops.taught, name)

        y = op("rotate")(self.b(op("scaled_relu")(self.a(x), self.w)), self.angle)
        return self.c(op(self.norm)(y, self.g, 1e-6))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_rules() -> Iterator[None]:
    before = dict(TAUGHT.rules)
    TAUGHT.rules.clear()
    yield
    TAUGHT.rules.clear()
    TAUGHT.rules.update(before)


def _teach(**others: Callable[[Operation], Any]) -> None:
    """Register the right rules, but for others that are given by name."""

    def rotate(op: Operation) -> Unit:
        op.dimensionless(op["angle"])
        return op.unit(op["x"])

    def norm(op: Operation) -> Unit:
        op.note_eps(op["eps"], op.unit(op["x"]))
        return op.unit(op["g"])

    rules = {"scaled_relu": multiplies, "rotate": rotate, "myrms": norm, "my_norm": norm}
    axes = {"scaled_relu": {}, "rotate": {"x": -1}, "myrms": {"x": -1}, "my_norm": {"x": 1}}
    for name, rule in {**rules, **others}.items():
        register_rule(f"taught::{name}", axes=axes[name])(rule)


def _spelled(found: osp.symmetry.Audit) -> list[Any]:
    return sorted(
        [(s.name, s.exponent, s.axes, s.index.tolist()) for s in family.slices]
        for family in found.families
    )


# --- right rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["myrms", "my_norm"])
def test_operations_of_ones_own_are_audited_as_the_same_in_plain_pytorch(norm: str) -> None:
    _teach()
    found, plain = osp.audit(Net(norm=norm), X), osp.audit(Net(plain=True), X)
    assert {"b.weight": 1} in found.scale_symmetries
    assert found.scale_symmetries == plain.scale_symmetries
    assert found.kinds == plain.kinds
    assert len(found.families) == 3
    assert _spelled(found) == _spelled(plain)
    assert found.limits == []
    assert all(s.tangent for s in found.spheres)
    assert max(leak.amount for leak in found.leaks) > 1e-6  # the real eps is that of the model
    assert found.taught_ops == ["taught::myrms", "taught::rotate", "taught::scaled_relu"] or (
        norm == "my_norm"
    )


def test_without_axes_only_whole_weights_are_claimed() -> None:
    _teach()
    for name in FUNCTIONS:
        if (rule := TAUGHT[f"taught::{name}"]) is not None:
            register_rule(rule.name)(rule.rule)
    found = osp.audit(Net(), X)
    assert {"b.weight": 1} in found.scale_symmetries
    assert found.families == []


def test_a_gradient_of_the_model_at_its_own_eps_is_not_changed() -> None:
    _teach()
    net = Net()
    net(X).square().sum().backward()
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    osp.audit(net, X)
    net.zero_grad()
    net(X).square().sum().backward()
    after = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(torch.equal(s, t) for s, t in zip(before, after, strict=True))


def test_only_what_note_eps_names_is_replaced() -> None:
    """A threshold of the size of an eps stays: what it refutes is not claimed."""

    class Above(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.c = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
            self.g = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.ops.taught.rms_above(self.a(1e-3 * x), self.g, 2e-3, 1e-12))

    @register_rule("taught::rms_above")
    def above(op: Operation) -> Unit:
        op.note_eps(op["eps"], op.unit(op["x"]))
        return op.unit(op["g"])  # and that the threshold knows a scale is forgotten

    ((site,), found) = trace(Above(), X).eps, osp.audit(Above(), X)
    assert (site.operation, site.argument) == ("taught::rms_above", "eps")
    assert {"a.weight": 1} not in found.scale_symmetries
    (limit,) = [x for x in found.limits if x.kind == "rules"]
    assert (limit.names, "taught::rms_above" in limit.words) == (("a.weight",), True)


# --- wrong rules ----------------------------------------------------------------------------------


def _forgets_eps(op: Operation) -> Unit:
    return op.unit(op["g"])


def test_what_the_numbers_refute_is_said_with_the_rule_and_is_not_known() -> None:
    _teach(myrms=_forgets_eps)
    found = osp.audit(Net(), X)
    assert {"b.weight": 1} not in found.scale_symmetries
    (limit,) = found.limits
    assert limit.kind == "rules"
    assert "b.weight" in limit.names
    assert "that the numbers refute" in limit.words
    assert "look at the rules of taught::myrms, taught::rotate" in limit.words
    assert limit.words in str(found).replace("\n      ", " ")


def test_kinds_of_weights_in_refuted_symmetries_are_not_known() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.g = nn.Linear(6, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.taught.myrms(self.a(x), self.g, 1e-6)

    _teach(myrms=_forgets_eps)
    assert set(osp.audit(Alone(), X).kinds.values()) == {Kind.UNKNOWN, Kind.FIXED}
    _teach()
    kinds = osp.audit(Alone(), X).kinds
    assert {kinds["a.weight"], kinds["a.bias"]} == {Kind.SHARED}
    assert kinds["g"] is Kind.FIXED


@pytest.mark.parametrize("axes", [None, {"x": -1}])
def test_an_argument_that_a_rule_forgets_is_mixed_all_the_same(axes: Any) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.g = nn.Linear(6, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.taught.myrms(self.a(x), self.g, 1e-6)

    register_rule("taught::myrms", axes=axes)(_forgets_eps)
    found = osp.audit(Normed().to("meta"), X.to("meta"))
    assert [dict(v) for v in found.scale_symmetries] == [{"a.weight": 1, "a.bias": 1}]
    assert found.families == []


def test_a_rule_with_wrong_axes_is_named_too() -> None:
    _teach()
    register_rule("taught::rotate", axes={})(TAUGHT["taught::rotate"].rule)  # it mixes pairs
    register_rule("taught::myrms", axes={})(TAUGHT["taught::myrms"].rule)  # it takes a mean
    found = osp.audit(Net(), X)
    (limit,) = [x for x in found.limits if x.kind == "rules"]
    assert "b.weight" in limit.names
    assert "taught::rotate" in limit.words
    assert len(found.families) == 3


def test_without_memory_the_text_says_on_what_it_rests() -> None:
    _teach()
    text = " ".join(str(osp.audit(Net().to("meta"), X.to("meta"))).split())
    exact = "xact if the rules of taught::myrms, taught::rotate, taught::scaled_relu are"
    assert f"E{exact}, by the operations" in text
    assert f"its symmetries are e{exact}, but not certified" in text


FAULTS: tuple[tuple[Callable[[Operation], Any], str], ...] = (
    (lambda op: op.unit(op["angel"]), "takes no argument 'angel'; its arguments are: x, angle"),
    (lambda op: None, "the rule of taught::rotate returned None, where a unit is needed"),
    (lambda op: 3, "the rule of taught::rotate returned 3, where a unit is needed"),
    (lambda op: op["x"], "the rule of taught::rotate returned a Tensor, where a unit is needed"),
    (lambda op: (op.unit(op["x"]),) * 2, "taught::rotate returned 2 units for 1 result"),
    (lambda op: (), "taught::rotate returned 0 units for 1 result"),
    (lambda op: ("x",), "taught::rotate returned 'x' among its units"),
    (
        lambda op: op.unit(op["x"]) * 0.5,
        "multiplied by an int or a Fraction, as Fraction(1, 2), not",
    ),
    (lambda op: 1 / 0, "the rule of taught::rotate raised ZeroDivisionError: division by zero"),
    (lambda op: op.note_eps(1e-3, Unit()), "note_eps takes an argument that is a constant"),
    (lambda op: op.note_eps(op["x"], Unit()), "note_eps takes an argument that is a constant"),
)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("rule", "words"), FAULTS, ids=[words[-25:] for _, words in FAULTS])
def test_a_fault_in_a_rule_is_told_as_one(
    rule: Callable[[Operation], Any], words: str, device: str
) -> None:
    _teach(rotate=rule)
    with pytest.raises(RuleError) as told:
        osp.audit(Net().to(device), X.to(device))
    assert words in str(told.value)
    assert str(told.value).startswith("the rule of taught::rotate")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("axes", "words"),
    [({"y": 0}, "takes no argument 'y'"), ({"x": 2}, "'x' has 2 axes")],
)
def test_axes_that_an_argument_does_not_have_are_told(axes: Any, words: str) -> None:
    _teach()
    register_rule("taught::rotate", axes=axes)(TAUGHT["taught::rotate"].rule)
    with pytest.raises(RuleError, match=words):
        osp.audit(Net(), X)


def test_axes_are_refused_where_results_do_not_line_up() -> None:
    _teach()

    @register_rule("taught::rotate", axes={})
    def rotate(op: Operation) -> Unit:
        op.dimensionless(op["x"])
        return op.unit(op["angle"])  # 4 numbers beside a result of 8

    with pytest.raises(RuleError, match=r"a result of shape \(5, 8\) does not"):
        osp.audit(Net(), X)


# --- operations that write ------------------------------------------------------------------------

library.define("taught::into", "(Tensor(a!) out, Tensor x) -> ()")


@library.impl("taught::into", "CPU")
def _into(out: Tensor, x: Tensor) -> None:
    out.copy_(x * 2)


library.register_fake("taught::into", lambda out, x: None)


class Writes(nn.Module):
    """Has an operation write into memory that was empty, beside a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.rand(4) + 1), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(self.w)
        torch.ops.taught.into(out, self.w)
        return (out + self.b).square() / (out.square() + self.b.square()) + 0 * x.sum()


def test_what_an_operation_writes_has_a_unit() -> None:
    assert trace(Writes(), X).basis == ()  # without a rule: nothing may be scaled

    @register_rule("taught::into")
    def into(op: Operation) -> Unit:
        return op.unit(op["x"])

    assert trace(Writes(), X).basis == ({"w": Fraction(1), "b": Fraction(1)},)


@pytest.mark.parametrize("constant", [False, True])
def test_what_was_known_of_memory_that_an_operation_writes_is_forgotten(constant: bool) -> None:
    """On the meta device, zeros that were written over are no zeros."""

    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.rand(4) + 1), nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros(4, device=x.device)
            torch.ops.taught.into(out, torch.ones_like(out) if constant else x[0, :4])
            return torch.nn.functional.normalize(out + self.w * self.b, dim=0)

    expected = ({"w": 1, "b": -1},)
    assert trace(Over(), X).basis == expected
    assert trace(Over().to("meta"), X.to("meta")).basis == expected


# --- rewriting -----------------------------------------------------------------------------------


class _Composed(nn.Module):
    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return _rms(x, g, 1e-3)


class _Fused(nn.Module):
    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return torch.ops.taught.myrms(x, g, 1e-3)


@pytest.mark.parametrize("inner", [_Composed, _Fused])
def test_an_eps_inside_a_module_is_replaced_where_a_rewrite_is_verified(
    inner: type[nn.Module],
) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.g, self.norm = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x), self.g)

    _teach()
    model = Outer()
    sites, state = trace(model, X).eps, wide_state(model)
    larger = {n: t * 7 if n.startswith("a.") else t for n, t in state.items()}
    (one,), (other,) = (
        outputs_in_float64(model, s, (X,), {}, None, sites) for s in (state, larger)
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    (own,) = outputs_in_float64(model, state, (X,), {}, None)
    assert float((own - one).abs().max()) > 1e-5


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "needs the name of an operation"),
        (("rotate",), "named with its library"),
        (("::rotate",), "named with its library"),
        (("mylib::",), "named with its library"),
        (("mylib.rotate",), "named with its library"),
        (("mylib::rotate.default",), 'give "mylib::rotate"'),
        (("mylib::a b",), "has a name such as"),
        ((pins,), "in parentheses"),
        ((torch.ops.aten.relu,), "in parentheses"),
    ],
)
def test_a_name_that_no_operation_has_is_refused(given: tuple[Any, ...], words: str) -> None:
    with pytest.raises(RuleError, match=words) as told:
        register_rule(*given)
    assert "\n" not in str(told.value)


def test_a_rule_is_a_function() -> None:
    with pytest.raises(RuleError, match="a rule is a function"):
        register_rule("taught::rotate")(None)  # type: ignore[arg-type]


def test_a_rule_may_come_before_its_operation() -> None:
    register_rule("taught::later")(multiplies)

    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.gain = nn.Parameter(torch.rand(4)), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.taught.later(self.w, self.w) * self.gain + 0 * x.sum()

    assert TAUGHT.without_operation() == ["taught::later"]
    _defined("later", _scaled_relu)
    assert TAUGHT.without_operation() == []
    (vector,) = trace(Later(), X).basis
    assert vector in ({"w": 1, "gain": -2}, {"w": Fraction(-1, 2), "gain": 1})


def test_a_rule_with_a_misspelt_name_is_told_beside_the_operation() -> None:
    _teach()
    del TAUGHT.rules["taught::rotate"]
    register_rule("taught::rotat")(pins)
    register_rule("elsewhere::operation")(pins)  # of a library that the model does not use
    (limit,) = [x for x in osp.audit(Net(), X).limits if not x.names]
    assert "A rule is registered for taught::rotat, and there is no operation" in limit.words
    assert limit.words.endswith("did you mean taught::rotate?")


# --- rules of the library -------------------------------------------------------------------------


def test_what_rules_of_the_library_give_and_numbers_refute_is_said_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))
    assert osp.audit(net, X).limits == []
    monkeypatch.setitem(RULES, "aten::tanh", passes)
    found = osp.audit(net, X)
    assert found.scale_symmetries == []
    (limit,) = found.limits
    assert (limit.kind, limit.names) == ("refuted", ("0.weight", "2.weight"))
    assert set(found.kinds.values()) == {Kind.FIXED}
