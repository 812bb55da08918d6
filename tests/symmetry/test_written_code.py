"""Code as people write it: inputs that once made the audit claim what is false, or fall silent."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere.symmetry import Audit, ModelError, audit

ROWS, WIDTH = 6, 5


class _Base(nn.Module):
    """A weight, a head after it, and a small gate beside."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.v = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.h = nn.Linear(ROWS, 3)


class _Written(_Base):
    """A model whose forward pass is one function of the table below."""

    def __init__(self, function: Callable[["_Written", Any], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def bucketize(m: _Written, x: Tensor) -> Tensor:
    return m.h(torch.bucketize(x @ m.w.T, torch.linspace(-2, 2, 9)).float() + x @ m.v.T)


def searchsorted(m: _Written, x: Tensor) -> Tensor:
    places = torch.searchsorted(torch.linspace(-2, 2, 9), (x @ m.w.T).contiguous())
    return m.h(places.float() + x @ m.v.T)


def read_by_python(m: _Written, x: Tensor) -> Tensor:
    return m.h(x @ (m.w / float(m.w.detach().norm())).T + x @ m.v.T)


def read_as_a_list(m: _Written, x: Tensor) -> Tensor:
    return m.h(x @ (m.w / m.w.detach().norm().tolist()).T + x @ m.v.T)


def detached_scale(m: _Written, x: Tensor) -> Tensor:
    return m.h(x @ (m.w / m.w.detach().norm()).T + x @ m.v.T)


def detached_rows(m: _Written, x: Tensor) -> Tensor:
    return m.h(x @ (m.w / m.w.detach().norm(dim=1, keepdim=True)).T + x @ m.v.T)


def no_derivative(m: _Written, x: Tensor) -> Tensor:
    y = x @ m.w.T
    return m.h(torch.floor_divide(y, 0.3 * y.abs().amax(1, keepdim=True)) + x @ m.v.T)


def state_in_place(m: _Written, x: Tensor) -> Tensor:
    state = torch.zeros(x.shape[0], ROWS)
    for _ in range(2):
        state.mul_(0.5).add_(torch.sigmoid(state) * F.normalize(x @ m.w.T, dim=1, eps=1e-9))
    return m.h(state + x @ m.v.T)


def state_with_a_scale(m: _Written, x: Tensor) -> Tensor:
    state = torch.zeros(x.shape[0], ROWS)
    for _ in range(2):
        state.mul_(0.5).add_(torch.sigmoid(state) * (x @ m.w.T))
        state.div_(state.norm(dim=1, keepdim=True) + 1e-30)
    return m.h(state + x @ m.v.T)


def out_argument(m: _Written, x: Tensor) -> Tensor:
    y = torch.empty(x.shape[0], ROWS)
    with torch.no_grad():
        torch.mm(x, m.w.T, out=y)
    return m.h(y + x @ m.v.T)


def before_a_sign(m: _Written, x: Tensor) -> Tensor:
    return m.h(torch.sign(x @ m.w.T - 0.01) + x @ m.v.T)


def before_a_bend(m: _Written, x: Tensor) -> Tensor:
    return m.h(torch.sqrt(torch.relu(x @ m.w.T - 0.01) ** 2 + 1) + x @ m.v.T)


def before_an_angle(m: _Written, x: Tensor) -> Tensor:
    y = x @ m.w.T
    return m.h(torch.atan2(y, y.flip(1) + 0.01) + x @ m.v.T)


def on_a_slice(m: _Written, x: Tensor) -> Tensor:
    y = x @ m.w.T
    y[:, :2] += 0.01
    return m.h(y / y.norm(dim=1, keepdim=True) + x @ m.v.T)


def with_two_uses(m: _Written, x: Tensor) -> Tensor:
    y = x @ m.w.T
    size = y.norm(dim=1, keepdim=True) + 1e-3
    return m.h(y / size + x @ m.v.T) * size


def eps_and_number(m: _Written, x: Tensor) -> Tensor:
    y, z = x @ m.w.T, x @ m.v.T
    return m.h(y / (y.norm(dim=1, keepdim=True) + 1e-3) + torch.sign(z + 1e-3))


def eps_as_a_floor(m: _Written, x: Tensor) -> Tensor:
    y = x @ m.w.T
    return m.h(y / y.norm(dim=1, keepdim=True).clamp(min=1e-6) + (x @ m.v.T).clamp(min=1e-6))


def noise(m: _Written, x: Tensor) -> Tensor:
    kept = torch.zeros_like(x).bernoulli_(0.5)
    y = F.normalize((x * kept) @ m.w.T, dim=1)
    return m.h(y + torch.randn_like(y) + torch.empty_like(y).normal_() + x @ m.v.T)


def rounded(m: _Written, x: Tensor) -> Tensor:
    return m.h(F.normalize((x @ m.w.T).to(torch.bfloat16).float(), dim=1) + x @ m.v.T)


def filled_by_where(m: _Written, x: Tensor) -> Tensor:
    y = x @ m.w.T
    return m.h(torch.where(y > 0, y, torch.zeros(1)) + torch.zeros_like(y).index_fill_(
        1, torch.tensor([0, 2]), 1.0) + x @ m.v.T)  # fmt: skip


W_IS_FREE = ({"w": 1},)
SCALED = ({"w": 1, "v": 1, "h.weight": -1},)


@dataclass(frozen=True)
class Case:
    function: Callable[[_Written, Any], Tensor]
    right: tuple[dict[str, int], ...]
    limits: tuple[str, ...] = ()
    tangent: bool = True
    granularity: str = ""


CASES = (
    Case(bucketize, ()),
    Case(searchsorted, ()),
    Case(read_by_python, W_IS_FREE, ("reads",), tangent=False),
    Case(read_as_a_list, W_IS_FREE, ("reads",), tangent=False),
    Case(detached_scale, W_IS_FREE, tangent=False, granularity="whole tensor"),
    Case(detached_rows, W_IS_FREE, tangent=False, granularity="per row"),
    Case(no_derivative, W_IS_FREE, ("gradients",)),
    Case(state_in_place, W_IS_FREE, granularity="whole tensor"),
    Case(state_with_a_scale, (), ("gradients",)),
    Case(out_argument, SCALED),
    Case(before_a_sign, ()),
    Case(before_a_bend, ()),
    Case(before_an_angle, ()),
    Case(on_a_slice, ()),
    Case(with_two_uses, ()),
    Case(eps_and_number, W_IS_FREE, granularity="whole tensor"),
    Case(eps_as_a_floor, W_IS_FREE, granularity="whole tensor"),
    Case(noise, W_IS_FREE, granularity="whole tensor"),
    Case(rounded, W_IS_FREE, granularity="whole tensor"),
    Case(filled_by_where, ()),
)


def _claims(found: Audit) -> list[dict[str, Fraction]]:
    return [dict(v) for v in found.scale_symmetries]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.function.__name__)
def test_right_with_memory(case: Case) -> None:
    torch.manual_seed(0)
    found = audit(_Written(case.function).eval(), torch.randn(8, WIDTH))
    assert _claims(found) == list(case.right)
    assert found.inert == []
    assert found.unknown_ops == []
    assert tuple(limit.kind for limit in found.limits) == case.limits
    assert all(s.tangent == case.tangent for s in found.spheres)
    assert not case.granularity or found.spheres[0].granularity == case.granularity


ON_META = [c for c in CASES if "reads" not in c.limits]


@pytest.mark.parametrize("case", ON_META, ids=lambda c: c.function.__name__)
def test_right_without_memory(case: Case) -> None:
    with torch.device("meta"):
        model = _Written(case.function).eval()
    found = audit(model, torch.empty(8, WIDTH, device="meta"))
    assert _claims(found) == list(case.right)
    assert found.unknown_ops == []


def test_a_number_that_is_not_to_be_had_is_a_limit() -> None:
    with torch.device("meta"):
        model = _Written(read_by_python).eval()
    found = audit(model, torch.empty(8, WIDTH, device="meta"))
    assert _claims(found) == []
    assert [(x.kind, x.names) for x in found.limits] == [("reads", ("w",))]
    assert "without memory" in found.limits[0].words


def test_a_decision_that_needs_values_is_one_clear_line() -> None:
    class Decides(_Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.h(x @ self.w.T) if self.w.norm() > 1 else x

    with torch.device("meta"):
        model = Decides()
    with pytest.raises(ModelError, match="meta device"):
        audit(model, torch.empty(8, WIDTH, device="meta"))


# --- tokens, masks, one-hots, positions -----------------------------------------------------------


class MaskFilledInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(11, 6), nn.Linear(6, 6, bias=False)
        self.h = nn.Linear(6, 2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.zeros(ids.shape)
        for row, length in enumerate(lengths.tolist()):
            mask[row, :length] = 1.0
        x = torch.relu(self.f(self.e(ids)))
        return self.h((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


class OneHotByScatter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, 6), nn.Linear(4, 6, bias=False)
        self.n, self.h = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        one_hot = torch.zeros(len(labels), 4)
        one_hot.scatter_(1, labels[:, None], 1.0)
        return self.h(self.n(torch.relu(self.a(x)) + self.c(one_hot)))


class PositionsMadeInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.h = nn.Embedding(17, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.n = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        p = torch.zeros(x.shape[1:])
        t = torch.arange(x.shape[1])[:, None] * torch.exp(-torch.arange(0, 8, 2).float())
        p[:, 0::2], p[:, 1::2] = torch.sin(t), torch.cos(t)
        return self.h(torch.tanh(self.f(self.n(x + p))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(20, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        return (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)


class EmptyCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(5, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        return self.o(torch.cat([torch.tensor([], dtype=y.dtype, device=y.device), y], -2))


class Cache(nn.Module):
    """Keys and values kept as a plain attribute, and written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 6, bias=False) for _ in range(3))
        self.o = nn.Linear(6, 3, bias=False)
        self.keys = torch.zeros(9, 9, 6)
        self.values: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        self.keys[:b, :t] = self.k(x)
        self.values["now"] = self.v(x)
        scores = self.q(x) @ self.keys[:b, :t].transpose(1, 2)
        return self.o(scores.softmax(-1) @ self.values["now"])


class Experts(nn.Module):
    """One expert per token: by index, or by gates most of which are 0."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.r = nn.Linear(5, 8, bias=False)
        self.experts = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(8))
        self.h = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        gate, chosen = self.r(x).softmax(-1).topk(1, -1)
        if self.dense:
            gates = torch.zeros(len(x), 8).scatter_(1, chosen, gate)
            y = sum(gates[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))
            return self.h(torch.relu(y))
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (chosen[:, 0] == e).nonzero()[:, 0]
            if len(mine):
                out.index_add_(0, mine, expert(x[mine]) * gate[mine])
        return self.h(torch.relu(out))


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.n = nn.Linear(5, 4), nn.LayerNorm(4, elementwise_affine=False)
        self.register_buffer("order", torch.tensor([2.0, 0.0, 1.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.l(x)[:, self.order.long()])


class EmptyParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(0, 4))
        self.l, self.n = nn.Linear(5, 4), nn.LayerNorm(4, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(torch.cat([self.p, self.l(x)]))


class WeightedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(5, 4, bias=False)
        self.loss = nn.CrossEntropyLoss(weight=torch.rand(4) + 0.5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(F.normalize(self.l(x), dim=1), labels)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.n = nn.Embedding(9, 6, sparse=True), nn.LayerNorm(6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.n(self.e(ids))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.EmbeddingBag(9, 6, sparse=True), nn.Linear(6, 3, bias=False)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.h(self.e(ids, offsets))


class Takes(nn.Module):
    """A batch by name, or as one dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.n = nn.Linear(5, 3), nn.LayerNorm(3, elementwise_affine=False)


class TakesABatch(Takes):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.n(self.l(batch["x"]))


class TakesNames(Takes):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.n(scale * self.l(x))


def _trade(*up: str, down: str) -> dict[str, int]:
    return {**dict.fromkeys(up, 1), down: -1}


ALL_EXPERTS = [f"experts.{e}.weight" for e in range(8)]
QK = {"q.weight": 1, "k.weight": -1}
IDS = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
ZEROS = torch.zeros(6, dtype=torch.long)

MODELS: tuple[tuple[str, Callable[[], nn.Module], Any, list[dict[str, int]], list[str]], ...] = (
    ("mask filled in place", MaskFilledInPlace, (IDS, torch.tensor([5, 3, 4, 2])),
     [_trade("e.weight", down="h.weight"), _trade("f.weight", down="h.weight")], []),
    ("one-hot by scatter", OneHotByScatter, (X, torch.arange(6) % 4),
     [{"a.weight": 1, "a.bias": 1, "c.weight": 1}, _trade("n.weight", "n.bias", down="h.weight")],
     []),
    ("equal labels", OneHotByScatter, (X, ZEROS),
     [{"a.weight": 1, "a.bias": 1, "c.weight": 1}, _trade("n.weight", "n.bias", down="h.weight")],
     []),
    ("positions made in forward", PositionsMadeInForward, IDS,
     [_trade("n.weight", "n.bias", down="f.weight")], []),
    ("equal tokens", Attention, torch.zeros(1, 8, dtype=torch.long),
     [QK, {"e.weight": 1, "q.weight": -2, "v.weight": -1}], []),
    ("one token", Attention, torch.tensor([[5]]),
     [QK, {"e.weight": 1, "q.weight": -2, "v.weight": -1}], []),
    ("empty cache", EmptyCache, X, [_trade("q.weight", down="o.weight")], []),
    ("cache in an attribute", Cache, X[None],
     [QK, {"v.weight": 1, "o.weight": -1}], []),
    ("experts by index", lambda: Experts(False), X[:2], [_trade(*ALL_EXPERTS, down="h.weight")],
     []),
    ("experts by zero gates", lambda: Experts(True), X[:2],
     [_trade(*ALL_EXPERTS, down="h.weight")], []),
    ("float buffer as index", Indexed, X, [{"l.weight": 1, "l.bias": 1}], []),
    ("empty parameter", EmptyParameter, X, [{"p": 1}, {"l.weight": 1, "l.bias": 1}], ["p"]),
    ("weighted loss, equal labels", WeightedLoss, (X, ZEROS), [{"l.weight": 1}], []),
    ("sparse embedding", Sparse, IDS % 9, [{"e.weight": 1}], []),
    ("sparse bag", Bag, (IDS.flatten() % 9, torch.tensor([0, 3, 7])),
     [_trade("e.weight", down="h.weight")], []),
    ("a batch as one input", TakesABatch, {"x": X}, [{"l.weight": 1, "l.bias": 1}], []),
    ("a batch by name", TakesNames, {"x": X}, [{"l.weight": 1, "l.bias": 1}], []),
)  # fmt: skip


def _same_span(found: list[dict[str, Fraction]], right: list[dict[str, int]]) -> bool:
    names = sorted({n for v in [*found, *right] for n in v})

    def rank(rows: list[Any]) -> int:
        matrix = torch.tensor([[float(v.get(n, 0)) for n in names] for v in rows])
        return int(torch.linalg.matrix_rank(matrix.double())) if rows else 0

    return len(found) == len(right) == rank(found) == rank(right) == rank([*found, *right])


@pytest.mark.parametrize(
    ("name", "make", "args", "right", "inert"), MODELS, ids=[m[0] for m in MODELS]
)
def test_models_as_people_write_them(
    name: str, make: Callable[[], nn.Module], args: Any, right: list[Any], inert: list[str]
) -> None:
    torch.manual_seed(0)
    found = audit(make().eval(), args)
    assert _same_span(_claims(found), right), found.scale_symmetries
    assert found.inert == inert
    assert found.unknown_ops == []
    assert found.unreached == []
    assert found.limits == []


def test_an_expert_is_out_of_reach_where_the_model_takes_no_other_inputs() -> None:
    class Fixed(Experts):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.equal(x.float(), torch.full((1, 5), 2.0)):
                raise ValueError("made for one input")
            return super().forward(x)

    torch.manual_seed(0)
    with pytest.raises(ModelError, match="made for one input"):
        audit(Fixed(False).eval(), torch.full((1, 5), 2.0))


# --- modules that are no plain nn.Module ----------------------------------------------------------


def _normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).eval()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")  # the category depends on the version
def test_a_script_is_one_clear_line() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.jit.trace(_normed(), X)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with pytest.raises(ModelError, match=r"the model is a ScriptModule.*give the nn\.Module"):
        audit(torch.jit.trace(_normed(), X), X)
    with pytest.raises(ModelError, match="'inner' of the model is a ScriptModule"):
        audit(Holds(), X)


def test_an_exported_program_is_audited_as_the_module_it_came_from() -> None:
    exported = torch.export.export(_normed(), (X,)).module()
    found, right = audit(exported, X), audit(_normed(), X)
    assert found.scale_symmetries == right.scale_symmetries
    assert found.inert == right.inert
    assert {s.granularity for s in found.spheres} == {s.granularity for s in right.spheres}
