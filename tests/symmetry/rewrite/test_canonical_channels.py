"""The canonical form channel by channel: balanced, verified, final, and in step with its modes."""

import copy
from dataclasses import replace
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere.symmetry import Audit, CanonicalizeError, Family, Slices, audit, canonicalize


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


def uneven(net: nn.Module) -> nn.Module:
    """Give the rows of all weights very different sizes."""
    generator = torch.Generator().manual_seed(1)
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(torch.randn(len(p), *[1] * (p.ndim - 1), generator=generator).double().exp())
    return net


def chain(*, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return uneven(nn.Sequential(
        nn.Linear(5, 8, bias), nn.ReLU(), nn.Linear(8, 6, bias), nn.ReLU(), nn.Linear(6, 3, bias)
    ))  # fmt: skip


def separable() -> nn.Module:
    """Convolutions with BatchNorm, one of them depthwise, and a linear map at the end."""
    torch.manual_seed(0)
    net = uneven(nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ))  # fmt: skip
    for _ in range(50):
        net(x(4, 3, 9, 9))
    return net


def transformer(*, norm_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return uneven(nn.Sequential(
        nn.Linear(8, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    ))  # fmt: skip


@cache
def of(name: str, train: bool = True) -> tuple[nn.Module, Tensor, Audit]:
    """Return a network, its input and its audit; nothing changes any of them."""
    build, given = NETWORKS[name]
    net = build().train(train)
    return net, given, audit(net, given, search_seconds=0)


NETWORKS = {
    "chain": (chain, x(7, 5)),
    "batch norm": (separable, x(4, 3, 9, 9)),
    "pre-norm": (transformer, x(2, 5, 8)),
    "post-norm": (lambda: transformer(norm_first=False), x(2, 5, 8)),
}


def norm(net: nn.Module) -> float:
    return sum(float(p.detach().square().sum()) for p in net.parameters()) ** 0.5


def change(net: nn.Module, other: nn.Module, given: Tensor, *, train: bool) -> float:
    with torch.no_grad():
        before, after = (copy.deepcopy(m).train(train)(given) for m in (net, other))
    return float((before - after).abs().max() / before.abs().max())


def same(net: nn.Module, other: nn.Module) -> bool:
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_less_norm_than_per_tensor_the_same_function_in_both_modes(name: str, train: bool) -> None:
    net, given, found = of(name, train)
    once, tensors = (canonicalize(net, found, channels=c) for c in (True, False))
    assert norm(once) < 0.999 * norm(tensors) < 0.999 * norm(net)
    assert max(change(net, once, given, train=mode) for mode in (True, False)) < 1e-12
    assert same(canonicalize(once, found), once)


@pytest.mark.parametrize("name", NETWORKS)
def test_powers_of_two_keep_every_bit(name: str) -> None:
    net, given, found = of(name)
    once = canonicalize(net, found, factors="binary")
    assert norm(once) < norm(net)
    assert change(net, once, given, train=True) == 0


def test_every_channel_is_balanced() -> None:
    net, _, found = of("chain")
    once = canonicalize(net, found)
    for layer, following in zip(once[:-1:2], once[2::2], strict=True):
        written = layer.weight.square().sum(1) + layer.bias.square()
        torch.testing.assert_close(written, following.weight.square().sum(0))


def test_whole_weights_only_when_asked() -> None:
    net, _, found = of("chain")
    once = canonicalize(net, found, channels=False)
    for layer in (0, 2, 4):
        ratios = once[layer].weight / net[layer].weight
        torch.testing.assert_close(ratios, ratios[:1, :1].expand_as(ratios))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_on_the_orbit_of_channels_has_the_same_form(name: str) -> None:
    net, _, found = of(name)
    other = copy.deepcopy(net)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    generator = torch.Generator().manual_seed(2)
    trades = [f for f in found.families if f.exact and len({s.exponent > 0 for s in f.slices}) > 1]
    assert trades
    with torch.no_grad():
        for family in trades:
            amounts = torch.rand(family.count, generator=generator).double() - 0.5
            for n, logs in family.log_factors(amounts, shapes, followers=True).items():
                tensors[n].mul_(logs.exp())
    one, two = (canonicalize(m, found) for m in (net, other))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=0)


def test_dead_channels_stay() -> None:
    net = chain(bias=False)
    with torch.no_grad():
        net[0].weight[2] = 0
        net[2].weight[:, 5] = 0
    found = audit(net, x(7, 5), search_seconds=0)
    once = canonicalize(net, found)
    assert not bool(once[0].weight[2].any())
    assert not bool(once[2].weight[:, 5].any())
    ratios = once[0].weight[5] / net[0].weight[5]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    assert bool(once[2].weight.isfinite().all())
    assert same(canonicalize(once, found), once)


def test_what_evaluation_alone_leaves_free_moves_only_there() -> None:
    net, given, found = of("batch norm", train=False)
    both, alone = canonicalize(net, found), canonicalize(net, found, modes="audited")
    assert norm(alone) < 0.99 * norm(both)
    assert change(net, alone, given, train=False) < 1e-12
    assert change(net, alone, given, train=True) > 1e-3


class BesideAnEps(nn.Module):
    """Channels that trade, and that a norm with an eps looks at as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        seen = F.instance_norm(y.transpose(1, 2))
        return torch.cat([self.second(y), seen.transpose(1, 2)], -1)


def test_an_eps_holds_channels_back_unless_asked() -> None:
    torch.manual_seed(0)
    net, given = uneven(BesideAnEps()), x(3, 6, 5)
    found = audit(net, given, search_seconds=0)
    assert [f.exact for f in found.families] == [False]
    tight = canonicalize(net, found)
    assert same(tight, canonicalize(net, found, channels=False))
    loose = canonicalize(net, found, exact=False, tolerance=0.1)
    assert norm(loose) < 0.99 * norm(tight)
    assert 1e-9 < change(net, loose, given, train=True) <= 0.1


def test_weights_with_a_radius_stay_out_of_trades() -> None:
    net, _, found = of("batch norm")
    unit = canonicalize(net, found, radius="unit", tolerance=1e-2)
    for layer in (0, 3, 6):
        rows = unit[layer].weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(rows, torch.ones_like(rows))


def false_family() -> Family:
    rows = (Slices("0.weight", Fraction(1), (0,), torch.arange(8)[:, None]),)
    columns = (Slices("2.weight", Fraction(-2), (1,), torch.arange(8)[:, None]),)
    return Family((*rows, *columns), 8)


def test_a_false_family_is_left_out_or_refused() -> None:
    net, given = chain(bias=False), x(7, 5)
    found = audit(net, given, search_seconds=0)
    wrong = replace(found, families=[*found.families, false_family()])
    assert same(canonicalize(net, wrong), canonicalize(net, found))  # evaluation tells
    with pytest.raises(CanonicalizeError, match="output would change"):
        canonicalize(net, wrong, modes="audited")


def test_weights_that_the_inputs_do_not_reach_hold_channels_back() -> None:
    net, _, found = of("chain")
    unseen = replace(found, unreached=["2.weight"])
    once = canonicalize(net, unseen)
    assert same(once, canonicalize(net, found, channels=False))


def test_an_audit_without_families_gives_the_form_of_whole_weights(tmp_path) -> None:
    net, given, found = of("chain")
    without = canonicalize(net, replace(found, families=[]))
    assert same(without, canonicalize(net, found, channels=False))
    read = type(found).from_json(found.to_json(tmp_path / "audit.json"))
    assert same(canonicalize(net, read, given), canonicalize(net, found))


def test_half_precision_moves_by_powers_of_two() -> None:
    net, given = chain().to(torch.bfloat16), x(7, 5).to(torch.bfloat16)
    once = canonicalize(net, of("chain")[2], given)
    octaves = (once[0].weight / net[0].weight).float().log2()
    assert torch.equal(octaves, octaves.round())
    assert len({*octaves[:, 0].tolist()}) > 1
    assert change(net, once, given, train=True) == 0
