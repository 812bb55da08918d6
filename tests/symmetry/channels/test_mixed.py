"""Symmetries that scale some weights as wholes and a part of others, each derived by hand."""

from copy import deepcopy
from dataclasses import replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from onsphere.symmetry import audit, canonicalize
from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.claims import Family, Slices


class SharedLength(nn.Module):
    """A map of weight norm used twice: before another one, and in front of the first half."""

    def __init__(self) -> None:
        super().__init__()
        self.map = weight_norm(nn.Linear(4, 4, bias=False))
        self.next = weight_norm(nn.Linear(4, 4, bias=False))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        half = self.map(torch.tanh(x))
        return self.out(torch.cat([half, torch.tanh(self.next(self.map(x)))], -1))


class NormedInPart(nn.Module):
    """Rows 0 to 3 of a map are normed together; of the others each is seen through a sine."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(5, 7, bias=False)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        normed, rest = self.down(x).split([4, 3], -1)
        return self.out(torch.cat([normed / normed.norm(dim=-1, keepdim=True), rest.sin()], -1))


def _moves(family: Family, net: nn.Module) -> dict[str, Tensor]:
    """Say by how much the logarithm of each entry moves."""
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters()}
    logs = family.log_factors(torch.ones(1), shapes)
    sign = next(iter(logs.values())).flatten()[0].sign() or 1.0
    return {n: (sign * t).broadcast_to(shapes[n]) for n, t in logs.items() if bool(t.any())}


def _alone(families: list[Family]) -> list[Family]:
    return [f for f in families if f.count == 1]


def test_a_shared_length_trades_with_the_columns_that_read_it() -> None:
    torch.manual_seed(0)
    net, x = SharedLength(), torch.randn(7, 4)
    for model, given in ((net, x), (SharedLength().to("meta"), x.to("meta"))):
        (family,) = _alone(channel_symmetries(model, given))
        moves = _moves(family, net)
        first, second = (f"{n}.parametrizations.weight.original0" for n in ("map", "next"))
        # map's length * a: what it gives next is undone there, and in columns 0 to 3 of out.
        assert moves.keys() == {first, second, "out.weight"}
        assert moves[first].eq(1).all()
        assert moves[second].eq(-1).all()
        assert moves["out.weight"][:, :4].eq(-1).all()
        assert not moves["out.weight"][:, 4:].any()


def test_a_shared_length_is_certified_and_said() -> None:
    torch.manual_seed(0)
    net, x = SharedLength(), torch.randn(7, 4)
    found = audit(net, x)
    assert len(_alone(found.families)) == 1
    told = " ".join(str(found).split())
    assert "out.weight columns 0 to 3" in told
    assert "all by one number" in told


def test_parts_that_lie_apart_are_told_apart() -> None:
    rows = torch.tensor([[0, 1, 2, 5, 7, 8]])
    some = Family((Slices("w", Fraction(1), (0,), rows),), 1)
    found = replace(
        audit(nn.Linear(3, 9, bias=False), torch.randn(2, 3)), families=[some],
        parameters={"w": (9, 3)},
    )  # fmt: skip
    assert "w rows 0 to 2 and 5 and 7 to 8 * a, all by one number" in str(found)


def test_a_part_of_a_weight_is_on_a_sphere_without_numbers() -> None:
    net = NormedInPart().to("meta")
    (family,) = _alone(channel_symmetries(net, torch.randn(9, 5, device="meta")))
    moves = _moves(family, net)
    assert moves.keys() == {"down.weight"}
    assert moves["down.weight"][:4].eq(1).all()
    assert not moves["down.weight"][4:].any()


def test_channels_do_not_depend_on_how_many_rows_a_batch_has() -> None:
    """A length per row and group is an unknown: many of them must not hide what hangs on them."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6))
            self.inner = nn.Linear(6, 6, bias=False)
            self.scale = nn.Parameter(torch.ones(6))
            self.register_buffer("mean", torch.randn(6))
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.inner(F.rms_norm(x, (6,), self.gain))
            y = F.group_norm(y.transpose(1, 2), 2).transpose(1, 2)
            z = (F.rms_norm(torch.tanh(y), (6,), self.gain) - self.mean) * self.scale
            return self.out(F.layer_norm(torch.tanh(z), (6,)))

    torch.manual_seed(0)
    net = Normed()
    told = [
        sorted((f.count, f.names) for f in channel_symmetries(net, torch.randn(*size, 6)))
        for size in ((2, 3), (7, 9), (16, 20))
    ]
    assert any(c == 6 and {"gain", "inner.weight", "scale", "mean"} == set(n) for c, n in told[0])
    assert told[0] == told[1] == told[2]


def test_a_part_and_a_whole_can_be_moved_together() -> None:
    """Buffers that estimate follow, so that the other mode stays as well."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = weight_norm(nn.Linear(4, 4, bias=False))
            self.next = weight_norm(nn.Linear(4, 4, bias=False))
            self.norm = nn.BatchNorm1d(4, eps=1e-10, affine=False)
            self.out = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            half, rest = self.map(torch.tanh(x)), torch.tanh(self.next(self.map(x)))
            return self.out(torch.cat([self.norm(half), half, rest], -1))

    torch.manual_seed(0)
    net, x = Counted(), torch.randn(16, 4)
    for _ in range(50):
        net(x)
    found = audit(net, x)
    (family,) = _alone(found.families)
    assert {s.name for s in family.followers} == {"norm.running_mean", "norm.running_var"}
    shapes = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    logs = family.log_factors(torch.tensor([0.7]), shapes, followers=True)
    other = deepcopy(net)
    other.load_state_dict({
        n: t * logs[n].float().exp() if n in logs else t for n, t in net.state_dict().items()
    })  # fmt: skip
    torch.testing.assert_close(other(x), net(x), rtol=1e-4, atol=1e-4)
    net.eval(), other.eval()
    torch.testing.assert_close(other(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_single_number_may_stand_against_a_part() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 7, bias=False)
            self.gain = nn.Parameter(torch.tensor(0.5))
            self.out = nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = F.rms_norm(self.up(x), (7,))
            return self.out(torch.cat([self.gain * y[:, :4], y[:, 4:]], -1))

    torch.manual_seed(0)
    net, x = Scaled(), torch.randn(5, 4)
    found = audit(net, x)
    (family,) = _alone(found.families)
    assert family.names == ("gain", "out.weight")
    torch.testing.assert_close(canonicalize(net, found, args=(x,))(x), net(x))
