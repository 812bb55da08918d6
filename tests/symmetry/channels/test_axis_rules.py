"""Every rule for axes against the rank of radial derivatives, slice by slice."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere.symmetry.channels.families import channel_symmetries
from symmetry.channels.slices import Columns, measured, rank

WIDTH = 6
TINY = 1e-60


@dataclass(frozen=True)
class Case:
    """What stands between two linear maps, and how many independent rescalings there must be.

    Args:
        name: in words.
        between: of the hidden tensor, ``[2, 5, 6]``.
        dimension: of all rescalings of slices.
        width: of the result.
    """

    name: str
    between: Callable[[Tensor], Tensor]
    dimension: int
    width: int = WIDTH


def _complex(y: Tensor) -> Tensor:
    turn = torch.polar(torch.ones(5, 3, dtype=y.dtype), torch.arange(15.0).view(5, 3).to(y.dtype))
    return torch.view_as_real(torch.view_as_complex(y.reshape(2, 5, 3, 2)) * turn).flatten(2)


def _filled(y: Tensor) -> Tensor:
    """Written in two parts, after Python looked at positions that are the same in every run."""
    places = torch.arange(6)
    half = 3 if (places[1:] > places[:-1]).all() else 2
    z = y.new_empty(y.shape)
    z[..., :half].copy_(y[..., half:])
    z[..., half:].copy_(y[..., :half])
    return z


def _part(y: Tensor) -> Tensor:
    z = y.clone()
    z[..., :3] = 2 * z[..., 3:]
    return z


def _assembled(y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    z[..., 4:] = y[..., :2]
    z[..., :4] = y[..., 2:]
    return z


def _permuted(y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    z[:, :, [3, 4, 5, 0, 1, 2]] = y
    return z


def _heads(y: Tensor) -> Tensor:
    q = y.unflatten(-1, (2, 3)).transpose(1, 2)
    return (q @ q.transpose(-1, -2) @ q).transpose(1, 2).flatten(-2)


def _batch_norm(y: Tensor) -> Tensor:
    return F.batch_norm(y.flatten(0, 1), None, None, training=True, eps=TINY)


def _rotated(y: Tensor) -> Tensor:
    half = torch.cat([-y[..., 3:], y[..., :3]], -1)
    return 0.6 * y + 0.8 * half


def _zeroed(y: Tensor, places: Tensor) -> Tensor:
    z = y.clone()
    z[:, :, places] = 0
    return z


def _images(y: Tensor) -> Tensor:
    """Lay tokens out as images of 2 by 2."""
    return y[:, :4].transpose(1, 2).unflatten(-1, (2, 2))


def _space(images: Tensor) -> Tensor:
    return images.flatten(2).transpose(1, 2)


ORDER = torch.tensor([2, 0, 1, 5, 4, 3])
TABLE = torch.arange(30.0, dtype=torch.float64).reshape(5, 6)
CASES = (
    Case("nothing", lambda y: y, 6),
    Case("relu", F.relu, 6),
    Case("gelu", F.gelu, 0),
    Case("softmax", lambda y: y.softmax(-1), 0),
    Case("square root of squares", lambda y: y.square().sqrt(), 6),
    Case("cube", lambda y: y**3, 6),
    Case("permuted twice", lambda y: y.permute(2, 0, 1).permute(1, 2, 0), 6),
    Case("halves swapped", lambda y: torch.cat([y[..., 3:], y[..., :3]], -1), 6),
    Case("halves added", lambda y: y[..., 3:] + y[..., :3], 3, 3),
    Case("halves multiplied", lambda y: y[..., 3:] * y[..., :3], 6, 3),
    Case("chunks gated", lambda y: y.chunk(2, -1)[0] * y.chunk(2, -1)[1].sigmoid(), 3, 3),
    Case("gated by glu", lambda y: F.glu(y, -1), 3, 3),
    Case("gated by glu, tokens", lambda y: F.glu(y[:, :4], 1), 0),
    Case("split and stacked", lambda y: torch.stack(y.split(2, -1), -1).flatten(-2), 6),
    Case("unbound", lambda y: torch.stack(y.unbind(-1)[::-1], -1), 6),
    Case("flipped", lambda y: y.flip(-1), 6),
    Case("rolled", lambda y: y.roll(1, -1), 6),
    Case("repeated", lambda y: y.repeat(1, 1, 2), 6, 12),
    Case("one selected", lambda y: y[..., 1:2], 6, 1),
    Case("picked", lambda y: y[..., ORDER], 6),
    Case("picked by index_select", lambda y: y.index_select(-1, ORDER), 6),
    Case("gathered", lambda y: y.gather(2, ORDER.expand(y.shape)), 6),
    Case("tokens gathered", lambda y: y.gather(1, torch.zeros(2, 1, 6, dtype=torch.long)), 6),
    Case("written in part", _part, 6),
    Case("assembled in place", _assembled, 6),
    Case("permuted in place", _permuted, 6),
    Case("copied by index", lambda y: torch.zeros_like(y).index_copy(2, ORDER, y), 6),
    Case("padded by channels", lambda y: F.pad(y, (1, 1)), 8, 8),
    Case("channels cut off", lambda y: F.pad(y, (-1, -2)), 6, 3),
    Case("padded by tokens", lambda y: F.pad(y, (0, 0, 1, 0)), 6),
    Case("sum over tokens", lambda y: y.sum(1), 6),
    Case("sum over channels", lambda y: y.sum(-1, keepdim=True), 1, 1),
    Case("largest channel", lambda y: y.amax(-1, keepdim=True), 1, 1),
    Case("sorted channels", lambda y: y.sort(-1).values, 1),
    Case("sorted tokens", lambda y: y.sort(1).values, 6),
    Case("cumulative", lambda y: y.cumsum(1), 6),
    Case("centred tokens", lambda y: y - y.mean(1, keepdim=True), 6),
    Case("centred channels", lambda y: y - y.mean(-1, keepdim=True), 1),
    Case("on the sphere", lambda y: y / y.norm(dim=-1, keepdim=True), 1),
    Case("on the sphere, tokens", lambda y: y / y.norm(dim=1, keepdim=True), 6),
    Case("layer norm", lambda y: F.layer_norm(y, (WIDTH,), eps=TINY), 1),
    Case("group norm", lambda y: F.group_norm(y.transpose(1, 2), 3, eps=TINY).transpose(1, 2), 3),
    Case("batch norm", _batch_norm, 6),
    Case("heads", _heads, 2),
    Case("rotated halves", _rotated, 3),
    Case("rotated as complex numbers", _complex, 3),
    Case("written into a fresh tensor", _filled, 6),
    Case("a table added", lambda y: y + TABLE[:, : y.shape[-1]], 0),
    Case("pooled", lambda y: F.max_pool1d(y.transpose(1, 2), 2).transpose(1, 2), 6),
    Case("pixels shuffled", lambda y: _space(F.pixel_shuffle(_images(y)[:, :4], 2)), 3, 1),
    Case("pixels shuffled back", lambda y: _space(F.pixel_unshuffle(_images(y), 2)), 6, 24),
    Case("channels shuffled", lambda y: _space(F.channel_shuffle(_images(y), 3)), 6),
    Case("transformed along tokens", lambda y: torch.fft.fft(y, dim=1).real, 6),
    Case("convolved by transforms", lambda y: torch.fft.irfft(torch.fft.rfft(y, 8, 1), 8, 1), 6),
    Case("transformed along channels", lambda y: torch.fft.fft(y, dim=-1).real, 1),
    Case("zeros chosen", lambda y: torch.where(torch.arange(6) < 2, 0.0, y), 8),
    Case("zeros chosen for the others", lambda y: y.where(torch.arange(6) < 2, 0.0), 10),
    Case("zeros written at places", lambda y: _zeroed(y, ORDER[:2]), 8),
    Case("zeros written where a mask says", lambda y: _zeroed(y, torch.arange(6) > 3), 8),
    Case("zeros filled in", lambda y: y.index_fill(2, ORDER[:2], 0.0), 8),
    Case("zeros scattered", lambda y: y.scatter(2, ORDER[:1].expand(2, 1, 1), 0.0), 6),
    Case("unfolded channels", lambda y: y.unfold(2, 2, 2).mean(-1), 3, 3),
    Case("masked channels", lambda y: y.masked_fill(torch.arange(6) < 2, 0.0), 8),
    Case("outer product", lambda y: y[..., :3, None] * y[..., None, 3:], 4, 3),
)  # fmt: skip


class Between(nn.Module):
    """Two linear maps without biases, and an operation between them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.a = nn.Linear(4, WIDTH, bias=False)
        self.b = nn.Linear(case.width, 3, bias=False)
        self.between = case.between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_an_operation_moves_axes_as_its_rule_says(case: Case) -> None:
    torch.manual_seed(0)
    net = Between(case).double()
    families = channel_symmetries(net, torch.randn(2, 5, 4, dtype=torch.float64))
    columns = Columns.of(net)
    null = measured(net, lambda g: (torch.randn(2, 5, 4, generator=g).double(),), columns)
    trivial, claimed = columns.trivial(), columns.claimed(families)
    # Nothing is claimed that gradients refute, and with whole weights nothing is left out.
    assert rank(null, trivial, claimed) == rank(null)
    whole = _whole(net, columns)
    assert rank(claimed, trivial, whole) == rank(null)
    assert rank(null) - rank(trivial) == case.dimension


def _whole(net: nn.Module, columns: Columns) -> Tensor:
    """The symmetries of whole weights, as an audit by whole tensors finds them."""
    from onsphere.symmetry.exact.trace import trace

    rows = [
        [float(v.get(n, 0)) * (a == 0) for n, a, _ in columns.names]
        for v in trace(net, torch.randn(2, 5, 4, dtype=torch.float64)).basis
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(columns.names))
