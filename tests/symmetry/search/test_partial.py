"""Weights of which only a part is on a sphere or inert: fused projections, found and certified."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere.symmetry import Kind, audit
from onsphere.symmetry.claims import EFFECT_OF_DECAY
from onsphere.symmetry.search.partial import null_intervals

WIDTH, HEADS = 12, 2


class FusedAttention(nn.Module):
    """Queries, keys and values from one matrix, with or without QK-norm."""

    def __init__(self, normalized: bool) -> None:
        super().__init__()
        self.normalized = normalized
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in parts)
        if self.normalized:
            q, k = F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def _audited(net: nn.Module) -> dict[tuple[str, str], tuple[int, tuple[tuple[int, int], ...]]]:
    torch.manual_seed(0)
    found = audit(net, torch.randn(3, 5, WIDTH))
    return {(p.name, p.kind): (p.axis, p.intervals) for p in found.parts}


def test_the_key_part_of_a_fused_bias_is_inert() -> None:
    torch.manual_seed(0)
    parts = _audited(FusedAttention(normalized=False))
    assert parts == {("qkv.bias", "inert"): (0, ((WIDTH, 2 * WIDTH),))}


def test_the_key_part_of_a_fused_bias_is_in_what_to_do() -> None:
    torch.manual_seed(0)
    found = audit(FusedAttention(normalized=False), torch.randn(3, 5, WIDTH))
    (said,) = [words for words in found.advice() if "A part of 1 weight" in words]
    assert f"of qkv.bias the entries [{WIDTH}:{2 * WIDTH}]" in said


def test_query_biases_that_hardly_matter_do_not_hide_the_key_part() -> None:
    torch.manual_seed(0)
    net = FusedAttention(normalized=False)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.01)  # scores are nearly equal
    parts = _audited(net)
    assert parts == {("qkv.bias", "inert"): (0, ((WIDTH, 2 * WIDTH),))}


def test_queries_and_keys_without_bias_live_on_spheres_head_by_head() -> None:
    torch.manual_seed(0)
    net = FusedAttention(normalized=True)
    net.qkv.bias = None
    parts = _audited(net)
    size = WIDTH // HEADS
    spheres = tuple((i * size, (i + 1) * size) for i in range(2 * HEADS))
    assert parts == {("qkv.weight", "sphere"): (0, spheres)}


def test_a_whole_sphere_is_no_part() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 2))
    assert _audited(net) == {}


def test_rows_that_no_token_reaches_are_no_part() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 3))
    assert audit(net, torch.tensor([[1, 2, 3]])).parts == []


@pytest.mark.parametrize(
    ("radial", "expected"),
    [
        ([1.0, -1.0, 3.0], ((0, 2),)),
        ([0.0, 0.0, 1.0], ((0, 1), (1, 2))),
        ([1.0, 2.0, 3.0], ()),
        ([5.0, 1.0, 1.0, -2.0], ((1, 4),)),
    ],
)
def test_null_intervals_are_the_shortest(
    radial: list[float], expected: tuple[tuple[int, int], ...]
) -> None:
    rows = torch.tensor([radial, [2 * r for r in radial]], dtype=torch.float64)
    assert null_intervals(rows, torch.full_like(rows, 6.0)) == expected


def test_weight_decay_is_told_of_the_parts_of_fused_weights() -> None:
    torch.manual_seed(0)
    found = audit(FusedAttention(normalized=False), torch.randn(3, 5, WIDTH))
    assert found.free_parts == {}
    traded = {n for n, kind in found.kinds.items() if kind is Kind.TRADED}
    assert traded == {"qkv.weight", "qkv.bias", "out.weight"}
    assert found.decay_of("out.bias") == EFFECT_OF_DECAY[Kind.FIXED]
    said = str(found).partition("WEIGHT DECAY")[2].replace("\n      ", " ")
    assert "balances them, on 3 weights: qkv.weight, qkv.bias, out.weight" in said
    assert "which is part of the function, on 1 weight: out.bias" in said


def test_weight_decay_is_told_of_a_part_that_is_no_part_of_the_function() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(4, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.both(x).chunk(2, dim=-1)
            return F.normalize(a, dim=-1) + torch.tanh(b)

    torch.manual_seed(0)
    found = audit(Split(), torch.randn(5, 4))
    assert found.free_parts == {"both.weight": 0.5}
    assert found.decay_of("both.weight").startswith("a real penalty on a part")
    assert str(found).startswith("Split in training mode: 1 weight with 32 entries, 0 scale symm")
    assert "have no effect, on 1 weight: both.weight" in str(found).replace("\n      ", " ")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_without_entries_have_no_parts() -> None:
    torch.manual_seed(0)
    loss = nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10])  # 8 // 16 features for the rarest
    found = audit(loss, (torch.randn(6, 8), torch.randint(0, 20, (6,))))
    assert not [p for p in found.parts if p.name.startswith("tail.1")]
    assert found.kinds["head.weight"] == "scale-dependent"
