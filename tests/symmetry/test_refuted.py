"""What seems to hold near the weights given, at one draw or one input, and does not: no claims."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere.symmetry import audit


class _Model(nn.Module):
    """Two weights, a head, and a forward pass that is one function of the tables below."""

    shared = torch.ones(6)

    def __init__(self, function: Callable[["_Model", Tensor], Any], scale: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(scale * torch.randn(6, 5))
        self.v = nn.Parameter(torch.randn(6, 5))
        self.h = nn.Linear(6, 3)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _audited(function: Callable[[_Model, Tensor], Any], *, training: bool = False, **kind: Any):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = _Model(function, **kind).train(training)
    return audit(model, torch.randn(6, 5))


def pow2_by_python(m: _Model, x: Tensor) -> Tensor:
    size = 2.0 ** math.ceil(math.log2(m.w.abs().max().item()))
    return m.h(x @ (m.w / size).T + x @ m.v.T)


def pow2_by_frexp(m: _Model, x: Tensor) -> Tensor:
    return m.h(x @ m.w.T / 2.0 ** math.frexp(m.w.norm().item())[1] + x @ m.v.T)


def halved_until_small(m: _Model, x: Tensor) -> Tensor:
    w, size, turns = m.w, float(m.w.norm()), 0
    while size > 1 and turns < 200:
        size, w, turns = size / 2, w / 2, turns + 1
    while size < 0.5 and turns < 200:
        size, w, turns = size * 2, w * 2, turns + 1
    return m.h(x @ w.T + x @ m.v.T)


def pow2_by_tensors(m: _Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        size = m.w.abs().max().log2().floor().exp2()
    return m.h(x @ (m.w / size).T + x @ m.v.T)


def clamped_at_the_largest_half(m: _Model, x: Tensor) -> Tensor:
    return m.h(F.normalize((x @ m.w.T).clamp(max=65504.0), dim=1) + x @ m.v.T)


def clamped_at_a_million(m: _Model, x: Tensor) -> Tensor:
    return m.h(F.normalize((x @ m.w.T).clamp(-1e6, 1e6), dim=1) + x @ m.v.T)


def saturated_by_a_constant(m: _Model, x: Tensor) -> Tensor:
    return m.h(x @ m.v.T) * (m.w**2 / (m.w**2 + 1e-2)).sum()


def vanishing_but_for_eps(m: _Model, x: Tensor) -> Tensor:
    size = (x @ m.w.T).norm(dim=1, keepdim=True)
    return m.h(x @ m.v.T) + (1 - size / (size + 1e-3)) * 1e3


def bent(m: _Model, x: Tensor) -> Tensor:
    return m.h(torch.tanh(x @ m.w.T) + x @ m.v.T)


NOTHING_OF_W = (
    pow2_by_python,
    pow2_by_frexp,
    halved_until_small,
    pow2_by_tensors,
    clamped_at_the_largest_half,
    clamped_at_a_million,
    saturated_by_a_constant,
    vanishing_but_for_eps,
)


@pytest.mark.parametrize("function", NOTHING_OF_W, ids=lambda f: f.__name__)
def test_nothing_is_claimed_of_a_weight_that_keeps_its_scale(
    function: Callable[[_Model, Tensor], Tensor],
) -> None:
    found = _audited(function)
    assert not any("w" in v for v in found.scale_symmetries), found.scale_symmetries
    assert found.inert == []


@pytest.mark.parametrize("scale", [1e-20, 1e-14, 1e10, 1e20])
def test_extreme_weights_are_tried_at_ordinary_sizes(scale: float) -> None:
    found = _audited(bent, scale=scale)
    assert not any("w" in v for v in found.scale_symmetries), found.scale_symmetries
    assert found.inert == []


def test_what_acts_through_an_eps_leaves_the_rest_as_it_is() -> None:
    found = _audited(saturated_by_a_constant)
    assert found.scale_symmetries in ([{"v": 1, "h.weight": -1}], [{"v": -1, "h.weight": 1}])


# --- random branches ------------------------------------------------------------------------------


def _by_python() -> bool:
    return random.random() < 0.5


def _by_numpy() -> bool:
    return bool(np.random.rand() < 0.5)  # noqa: NPY002 - as people write it


def _by_a_new_generator() -> bool:
    return bool(np.random.default_rng().random() < 0.5)


def _by_torch() -> bool:
    return bool(torch.rand(()) < 0.5)


DRAWS = (_by_python, _by_numpy, _by_a_new_generator, _by_torch)


@pytest.mark.parametrize("drawn", DRAWS, ids=lambda f: f.__name__)
def test_a_layer_that_is_left_out_at_random_is_not_inert(drawn: Callable[[], bool]) -> None:
    def layer_drop(m: _Model, x: Tensor) -> Tensor:
        y = x @ m.v.T
        return m.h(y + torch.tanh(x @ m.w.T) if drawn() else y)

    found = _audited(layer_drop, training=True)
    assert found.inert == []
    assert found.unreached == []
    assert found.scale_symmetries == []


def test_random_states_are_put_back() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    _audited(lambda m, x: m.h(x @ m.w.T * random.random() + x @ m.v.T * np.random.rand()))  # noqa: NPY002
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


# --- results that are no tensors ------------------------------------------------------------------


@pytest.mark.parametrize(
    "taken",
    [
        lambda y: y.norm().item(),
        lambda y: y.softmax(-1).max().item(),
        lambda y: y.tolist(),
        lambda y: y.detach().numpy(),
        lambda y: {"size": float(y.abs().sum())},
    ],
    ids=["item", "item of unit 0", "list", "array", "in a dictionary"],
)
def test_numbers_among_the_results_must_not_change_either(taken: Callable[[Tensor], Any]) -> None:
    found = _audited(lambda m, x: (m.h(x @ m.v.T), taken(x @ m.w.T)))
    assert found.inert == []
    assert {n for v in found.scale_symmetries for n in v} == {"v", "h.weight"}


# --- models that take only some values ------------------------------------------------------------


def test_a_model_that_refuses_large_weights_is_audited_where_it_runs() -> None:
    def guarded(m: _Model, x: Tensor) -> Tensor:
        assert m.w.abs().max() < 1e4, "exploded"
        return m.h(F.normalize(x @ m.w.T, dim=1) + x @ m.v.T)

    found = _audited(guarded)
    assert {"w": 1} in found.scale_symmetries


def test_complex_weights_and_sparse_results() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Parameter(torch.randn(5, 6, dtype=torch.cfloat))
            self.h = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = (x.to(torch.cfloat) @ self.c).abs()
            return self.h(y / y.mean(1, keepdim=True)).to_sparse()

    torch.manual_seed(0)
    found = audit(Waves(), torch.randn(6, 5))
    assert found.scale_symmetries == [{"c": 1}]
    assert found.inert == []


# --- gradients taken inside -----------------------------------------------------------------------


def _inner_step(m: _Model, x: Tensor) -> Tensor:
    """One step of MAML, of the first order."""
    (slope,) = torch.autograd.grad(torch.tanh(x @ m.w.T).pow(2).mean(), m.w)
    return m.h(F.normalize(x @ slope.T, dim=1) + x @ m.v.T)


def _penalty(m: _Model, x: Tensor) -> Tensor:
    """A gradient with respect to the inputs."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(torch.relu(x @ m.w.T).sum(), x, create_graph=True)
    return m.h(x @ m.v.T) / slope.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_taken_inside_are_followed(training: bool) -> None:
    assert _audited(_inner_step, training=training).scale_symmetries == []
    found = _audited(_penalty, training=training)
    assert found.unknown_ops == []
    assert sorted(n for v in found.scale_symmetries for n in v) == [
        "h.bias", "h.weight", "h.weight", "v", "w"
    ]  # fmt: skip
    assert found.inert == []


# --- what a model keeps outside its modules -------------------------------------------------------

MOVING = torch.zeros(6)


def test_tensors_outside_the_model_are_as_they_were() -> None:
    def moves(m: _Model, x: Tensor) -> Tensor:
        y = x @ m.w.T
        MOVING.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        _Model.shared = 0.9 * _Model.shared + 0.1 * y.detach().abs().mean(0)
        return m.h(y / MOVING.norm() + x @ m.v.T / _Model.shared.norm())

    shared = _Model.shared
    found = _audited(moves)
    assert MOVING.tolist() == [0.0] * 6
    assert _Model.shared is shared
    assert shared.tolist() == [1.0] * 6
    assert found.inert == []


# --- floating-point masks and flags ---------------------------------------------------------------


class _Classes(nn.Module):
    """A class goes in as a one-hot vector that Python fills; a norm takes away what all share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, 6), nn.Linear(4, 6, bias=False)
        self.n, self.h = nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hot = torch.zeros(len(labels), 4)
        for row, label in zip(hot, labels.tolist(), strict=True):
            row[label] = 1.0
        return self.h(self.n(torch.relu(self.a(x)) + self.c(hot)))


@pytest.mark.parametrize("label", [0, 1, 2, 3])
def test_classes_that_are_all_equal_become_others(label: int) -> None:
    torch.manual_seed(0)
    found = audit(_Classes(), (torch.randn(4, 5), torch.full((4,), label)))
    assert "c.weight" not in found.inert
    assert not any("c.weight" in v and "a.weight" not in v for v in found.scale_symmetries)


class _BelowThreshold(nn.Module):
    """Of tokens that are long enough only the mean is taken away; a shift moves some across."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.a, self.w, self.centred = nn.Linear(6, 6), nn.Parameter(torch.randn(3, 6)), centred

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x / (x.abs().mean(-1, keepdim=True) + 1e-60))
        if not self.centred:
            y = torch.where(y.norm(dim=-1, keepdim=True) < 0.7, torch.ones_like(y), y)
        return y @ (self.w - self.w.mean(-1, keepdim=True)).T


@pytest.mark.parametrize("seed", [6, 7, 9, 17])  # of which few draws told nothing
def test_a_shift_that_crosses_a_threshold_now_and_then_is_none(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(1, 4, 6)
    assert "a.bias" in {shift.name for shift in audit(_BelowThreshold(True).eval(), x).shifts}
    assert "a.bias" not in {shift.name for shift in audit(_BelowThreshold(False).eval(), x).shifts}


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x, x, x, attn_mask=mask)[0]


def test_a_mask_of_infinities_is_redrawn() -> None:
    torch.manual_seed(0)
    alone = torch.full((5, 5), -math.inf).fill_diagonal_(0.0)  # each sees itself: no scores count
    found = audit(_Attends().eval(), (torch.randn(2, 5, 6), alone))
    assert found.scale_symmetries == []  # queries, keys and values share one tensor
    assert found.parts == [] or all(p.kind != "inert" for p in found.parts)


def test_flags_are_named() -> None:
    class Flagged(nn.Linear):
        def forward(self, x: Tensor, double: bool = False) -> Tensor:
            return super().forward(x) * (2 if double else 1)

    found = audit(Flagged(3, 2), (torch.randn(4, 3), False))
    assert any("False" in words and "stayed as given" in words for words in found.conditions)


def test_a_condition_names_what_inputs_never_reach_by_values() -> None:
    torch.manual_seed(0)

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + torch.relu(x.amax(1, keepdim=True) - 1e6) * self.b(x)

    found = audit(Beside(), torch.randn(6, 5))
    assert found.unreached == ["b.bias", "b.weight"]
    assert not any(n.startswith("b.") for v in found.scale_symmetries for n in v)
    assert any("No input that was tried reached b.bias" in words for words in found.conditions)


class Merged(nn.Module):
    """Pairs of tokens normalized together; an odd number of them is padded, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = nn.functional.pad(h, (0, 0, 0, h.shape[1] % 2))
        return self.head(self.norm(h.unflatten(1, (-1, 2)).flatten(2)))


@pytest.mark.parametrize("length", [6, 32, 64])
def test_a_shift_that_padding_refutes_is_not_claimed_of_long_inputs(length: int) -> None:
    torch.manual_seed(0)
    found = audit(Merged(), torch.randn(2, length, 3))
    assert not [s for s in found.shifts if s.name.startswith("first")]


@pytest.mark.parametrize("others", [1.0, (0.7, 1.2, 0.4, 2.0)])
@pytest.mark.parametrize("seed", [3, 5, 7])
def test_beside_a_variance_of_0_no_part_is_said_to_be_on_a_sphere(others: Any, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(5)
        net = nn.Sequential(nn.Linear(4, 5), norm, nn.ReLU(), nn.Linear(5, 3)).eval()
        norm.running_var[0], norm.running_var[1:] = 0.0, torch.tensor(others)
        found = audit(net, torch.randn(6, 4))
    assert found.parts == []
    if others != 1.0:  # else it looks like a mask, which is not redrawn
        assert len(found.scale_symmetries) == 3


class _BelowZero(nn.Module):
    """A map, and beside it what only numbers below 0 let through."""

    def __init__(self, gain: Tensor, data: bool) -> None:
        super().__init__()
        self.map, self.side = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain, self.data = nn.Parameter(gain), data

    def forward(self, x: Tensor) -> Tensor:
        if self.data:
            return self.map(x) + (-x).relu() * self.gain
        return self.map(x) + (-self.gain).relu() * self.side(x)


@pytest.mark.parametrize("data", [False, True], ids=["weight", "data"])
def test_zeros_of_weights_and_data_may_have_either_sign(data: bool) -> None:
    torch.manual_seed(0)
    gain = torch.tensor([0.0, 0.0, 1.0, 1.0])
    x = torch.randn(6, 4).relu() if data else torch.randn(6, 4)
    found = audit(_BelowZero(gain, data), x)
    assert {"gain", "map.weight"}.isdisjoint(found.inert)
    assert "gain" not in found.own_spheres()
