"""Every rule for shifts against the null space of derivatives: what stands between two maps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere.symmetry.exact.shifts.rules import SHIFT_RULES
from onsphere.symmetry.shifts.families import shift_families
from symmetry.shifts.oracle import null_dimension


class Between(nn.Module):
    """Two linear maps with something between them, and weights that it may use.

    Args:
        between: of this network, of what the first map gives (``[7, 5, 6]``), and of the input.
    """

    def __init__(self, between: Callable[["Between", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.gain, self.more = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
        self.matrix = nn.Parameter(torch.ones(6, 6))
        self.norm = nn.LayerNorm(6)
        self.between = between
        with torch.no_grad():
            width = between(self, torch.rand(7, 5, 6), torch.rand(7, 5, 6)).shape[-1]
        self.last = nn.Linear(width, width + 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(torch.tanh(x))
        return torch.tanh(self.last(self.between(self, h, x)))


def _normalized(h: Tensor) -> Tensor:
    spread, mean = torch.var_mean(h, -1, keepdim=True)
    return (h - mean) / (spread + 1e-5).sqrt()


def _written(h: Tensor) -> Tensor:
    z = torch.zeros_like(h)
    z.copy_(h)
    z.mul_(2.0)
    return z.add_(1.0)


def _some(x: Tensor) -> Tensor:
    return x <= x.mean(-1, keepdim=True)


def _scores(x: Tensor) -> Tensor:
    return (x @ x.transpose(-1, -2)).softmax(-1)


def _attended(net: Between, h: Tensor, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, h, x)


def _looked_up(net: Between, h: Tensor, x: Tensor) -> Tensor:
    positions = torch.arange(h.shape[1])
    return h + F.embedding(positions, net.matrix) + net.matrix[positions]


RULES: dict[str, Callable[[Between, Tensor, Tensor], Tensor]] = {
    "nothing": lambda n, h, x: h,
    "neg": lambda n, h, x: -h,
    "sub": lambda n, h, x: n.gain - h,
    "rsub": lambda n, h, x: 2.0 - h,
    "multiple": lambda n, h, x: 0.5 * h + h / 3,
    "difference": lambda n, h, x: h - h.roll(1, 0),
    "gain": lambda n, h, x: h * n.gain,
    "divided": lambda n, h, x: h / n.gain,
    "divides": lambda n, h, x: n.gain / (h * h + 1),
    "addcmul": lambda n, h, x: torch.addcmul(h, n.gain, h),
    "squared": lambda n, h, x: h * h,
    "gate of data": lambda n, h, x: h * x[..., :1],
    "gelu": lambda n, h, x: F.gelu(h),
    "mean": lambda n, h, x: h.mean(1),
    "sum": lambda n, h, x: h.sum(1),
    "amax": lambda n, h, x: h.amax(1),
    "amax of channels": lambda n, h, x: h.roll(1, 0) - h.amax(-1, keepdim=True),
    "logsumexp": lambda n, h, x: h.logsumexp(1),
    "stack": lambda n, h, x: torch.stack([h, 2 * h], -1).flatten(-2),
    "cat": lambda n, h, x: torch.cat([h, x, h[..., :2]], -1),
    "constant_pad_nd": lambda n, h, x: F.pad(h, (1, -2)),
    "padded tokens": lambda n, h, x: F.pad(h, (0, 0, 1, 0)),
    "replication_pad1d": lambda n, h, x: F.pad(h.mT, (1, 2), mode="replicate").mT,
    "where": lambda n, h, x: torch.where(x[..., :1] > 0, h, h.flip(0)),
    "where of others": lambda n, h, x: torch.where(x[..., :1] > 0, h, x[..., :1]),
    "where infinite": lambda n, h, x: h.where(_some(x), torch.tensor(-torch.inf)).softmax(-1),
    "masked_fill": lambda n, h, x: h.masked_fill(~_some(x), -torch.inf).softmax(-1),
    "masked by 0": lambda n, h, x: h.masked_fill(x[..., :1] > 0, 0.0),
    "log_softmax": lambda n, h, x: F.log_softmax(h, -1),
    "softmax of tokens": lambda n, h, x: h.softmax(1),
    "layer_norm": lambda n, h, x: n.norm(h),
    "group_norm": lambda n, h, x: F.group_norm(h.flatten(0, 1), 3),
    "var_mean": lambda n, h, x: _normalized(h),
    "std": lambda n, h, x: x[..., :1] / (1 + h.std(-1, keepdim=True)) * n.gain,
    "index_select": lambda n, h, x: h.index_select(-1, torch.tensor([0, 2, 2, 5])),
    "index": lambda n, h, x: h[..., torch.tensor([4, 1, 1])],
    "index of data": lambda n, h, x: h[:, x[0, :, 0].argsort()],
    "gather": lambda n, h, x: h.gather(1, x[..., :1].argsort(1).expand(-1, -1, 6)),
    "slices": lambda n, h, x: h.chunk(2, -1)[1],
    "mm": lambda n, h, x: h.flatten(0, 1) @ n.matrix,
    "mm of data": lambda n, h, x: x[0].mT @ h[0],
    "bmm": lambda n, h, x: torch.bmm(h, n.matrix.expand(len(h), 6, 6)),
    "bmm of data": lambda n, h, x: torch.bmm(h, x.mT) @ n.matrix[:5],
    "baddbmm": lambda n, h, x: torch.baddbmm(h, h, n.matrix.expand(len(h), 6, 6), beta=0.5),
    "mv": lambda n, h, x: (h @ n.gain)[..., None],
    "addmv": lambda n, h, x: torch.addmv(n.more, n.matrix, h[0, 0])[None],
    "means by softmax": lambda n, h, x: _scores(x) @ h,
    "sums by softmax": lambda n, h, x: _scores(x).mT @ h,
    "masked means": lambda n, h, x: (_scores(x) * (x[..., :1] > 0)) @ h,
    "attention": _attended,
    "written in place": lambda n, h, x: _written(h),
    "detached": lambda n, h, x: h.detach() + h,
    "a table": _looked_up,
    "avg_pool1d": lambda n, h, x: F.avg_pool1d(h.mT, 2, padding=1, count_include_pad=False).mT,
    "padded avg_pool1d": lambda n, h, x: F.avg_pool1d(h.mT, 2, padding=1).mT,
    "upsample": lambda n, h, x: F.interpolate(h.mT, 9, mode="linear").mT,
}


@pytest.mark.parametrize("name", RULES)
def test_what_is_claimed_is_the_null_space(name: str) -> None:
    net = Between(RULES[name]).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator) * 0.6)
        for gain in (net.gain, net.norm.weight):
            gain.copy_(gain.abs() + 0.5)

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randn(7, 5, 6, dtype=torch.float64, generator=generator)

    held = ["matrix", "first.weight", "last.weight"]
    unused = _unused(net, draw(generator))
    found = shift_families(net, draw(generator), held=[*held, *unused])
    idle = sum(net.get_parameter(n).numel() for n in unused)
    assert sum(f.dimension for f in found) == null_dimension(net, draw) - idle


def test_what_python_reads_does_not_move() -> None:
    def read(net: Between, h: Tensor, x: Tensor) -> Tensor:
        return h * (2.0 if float(h.detach().sum()) > 0 else 1.0)

    assert shift_families(Between(read), torch.ones(7, 5, 6), held=["first.weight"]) == []


def test_what_a_rule_does_not_understand_does_not_move(monkeypatch) -> None:
    net, x = Between(RULES["gain"]), torch.rand(7, 5, 6)
    assert "first.bias" in {n for f in shift_families(net, x) for n in f.names}
    monkeypatch.setitem(SHIFT_RULES, "aten::mul", lambda op, run: op["no such argument"].shape)
    assert "first.bias" not in {n for f in shift_families(net, x) for n in f.names}


def _unused(net: nn.Module, x: Tensor) -> list[str]:
    """Return the vectors that the network does not use at all."""
    vectors = {n: p for n, p in net.named_parameters() if p.ndim == 1}
    found = torch.autograd.grad(net(x).sum(), [*vectors.values()], allow_unused=True)
    return [n for n, g in zip(vectors, found, strict=True) if g is None]
