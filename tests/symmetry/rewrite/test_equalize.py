"""Equalizing: which channels move, to where, and what stays."""

import copy
import warnings
from fractions import Fraction

import pytest
import torch
from torch import nn

import onsphere as osp
from onsphere.symmetry import EqualizeError, Family, Slices
from onsphere.symmetry.rewrite.balancing.channel_scales import (
    EQUAL_RANGES,
    LEAST_NORM,
    balanced,
    moved,
)
from onsphere.symmetry.rewrite.weight_grid import loss, rounded, total_loss


def chain(*, bias=True):
    """Three linear maps with ReLU between them, channels of very different ranges."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 8, bias), nn.ReLU(), nn.Linear(8, 6, bias), nn.ReLU(), nn.Linear(6, 3, bias)
    )
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.mul_((2 * torch.randn(len(layer.weight), 1)).exp())
    return net


def separable(*, norms):
    """A convolution, a depthwise one and a pointwise one, with or without BatchNorm."""
    torch.manual_seed(0)

    def block(conv, width):
        return [conv, *([nn.BatchNorm2d(width)] if norms else []), nn.ReLU()]

    net = nn.Sequential(
        *block(nn.Conv2d(3, 8, 3), 8),
        *block(nn.Conv2d(8, 8, 3, groups=8), 8),
        *block(nn.Conv2d(8, 6, 1), 6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(torch.randn(len(p), *[1] * (p.ndim - 1)).exp())
    return net


def rows(weight):
    return weight.abs().flatten(1).amax(1)


def columns(weight):
    return weight.abs().transpose(0, 1).flatten(1).amax(1)


def test_both_ranges_of_every_channel_are_equal_afterwards():
    net, x = chain(), torch.randn(7, 5)
    done = osp.equalize(net, x)
    first, second, third = done.model[::2]
    torch.testing.assert_close(rows(first.weight), columns(second.weight))
    torch.testing.assert_close(rows(second.weight), columns(third.weight))
    torch.testing.assert_close(done.model(x), net(x), rtol=1e-5, atol=1e-6)
    assert done.report.change_in_float64 < 1e-13


def test_one_pair_is_the_closed_form_of_the_paper():
    net = chain()[:3]
    r1, r2 = rows(net[0].weight), columns(net[2].weight)
    done = osp.equalize(net, torch.randn(4, 5))
    factor = (r2 / r1).sqrt()
    torch.testing.assert_close(done.model[0].weight, net[0].weight * factor[:, None])
    torch.testing.assert_close(done.model[0].bias, net[0].bias * factor)
    torch.testing.assert_close(done.model[2].weight, net[2].weight / factor)


def test_the_least_norm_is_one_that_no_channel_can_lower():
    net, x = chain(), torch.randn(7, 5)
    done = osp.equalize(net, x, objective="norm")
    assert done.report.norm_after < done.report.norm_before
    again = osp.equalize(done.model, x, objective="norm")
    assert again.report.norm_after == pytest.approx(done.report.norm_after, rel=1e-6)
    for layer, following in zip(done.model[:-1:2], done.model[2::2], strict=True):
        written = layer.weight.square().sum(1) + layer.bias.square()
        torch.testing.assert_close(written, following.weight.square().sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("grid", ["tensor", "channel", 1])
def test_the_rounding_loss_never_grows(bits, grid):
    net, x = chain(), torch.randn(7, 5)
    done = osp.equalize(net, x, objective="quantization", bits=bits, grid=grid)
    names = [f"{i}.weight" for i in (0, 2, 4)]

    def lost(model):
        state = {n: p.detach().double() for n, p in model.named_parameters()}
        return total_loss(state, names, bits, grid)

    # With a step for each entry only the rounding of float64 is lost.
    assert lost(done.model) <= lost(net) * (1 + 1e-6) + 1e-30
    if grid == "tensor":
        assert lost(done.model) < 0.5 * lost(net)


def test_training_goes_on_as_before():
    """A gain trades with its running variance in evaluation mode only: it stays where it is."""
    net, x = separable(norms=True).eval(), torch.randn(4, 3, 9, 9)
    for objective in ("range", "norm"):
        done = osp.equalize(net, x, objective=objective)
        for training in (False, True):
            now, then = (copy.deepcopy(m).train(training)(x) for m in (done.model, net))
            torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)
    assert done.report.modes == ("train", "eval")


def test_running_statistics_of_one_mode_are_free_where_it_is_asked():
    net, x = separable(norms=True).eval(), torch.randn(4, 3, 9, 9)
    one = osp.equalize(net, x, objective="norm", modes="current")
    both = osp.equalize(net, x, objective="norm")
    assert one.report.norm_after < 0.9 * both.report.norm_after
    assert one.report.modes == ("eval",)
    torch.testing.assert_close(one.model(x), net(x), rtol=1e-4, atol=1e-5)


def test_depthwise_convolutions_are_in_the_middle():
    net, x = separable(norms=False).eval(), torch.randn(4, 3, 9, 9)
    done = osp.equalize(net, x)
    assert sum(f.count for f in done.report.families) == 8 + 8 + 6
    first, middle, last = done.model[0], done.model[2], done.model[4]
    torch.testing.assert_close(rows(first.weight), rows(middle.weight))
    torch.testing.assert_close(rows(middle.weight), columns(last.weight))
    for w in done.report.weights:
        torch.testing.assert_close(w.after, rows(done.model.get_parameter(w.name)).double())


def test_weights_that_read_several_channels_are_balanced_against_the_largest():
    """Two readers: what is written has the range of the larger one."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.a, self.b = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x):
            x = self.up(x).relu()
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    net = Two()
    done = osp.equalize(net, torch.randn(3, 4)).model
    largest = torch.maximum(columns(done.a.weight), columns(done.b.weight))
    torch.testing.assert_close(rows(done.up.weight), largest)


def test_heads_of_attention_are_equalized():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with torch.no_grad():
        layer.linear1.weight[3] *= 50
    done = osp.equalize(layer.eval(), torch.randn(2, 5, 8))
    torch.testing.assert_close(rows(done.model.linear1.weight), columns(done.model.linear2.weight))
    names = [n for f in done.report.families for n in f.names]
    assert {"self_attn.in_proj_weight", "self_attn.out_proj.weight"} <= set(names)


def test_a_dead_channel_stays():
    net = chain()[:3]
    with torch.no_grad():
        net[0].weight[2] = 0
        net[2].weight[:, 5] = 0
    done = osp.equalize(net, torch.randn(4, 5)).model
    assert torch.equal(done[0].weight[2], net[0].weight[2])
    torch.testing.assert_close(done[0].weight[5], net[0].weight[5])
    assert done[0].weight.isfinite().all()


def test_nothing_to_equalize_is_said():
    net = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3))
    done = osp.equalize(net, torch.randn(2, 3))
    assert str(done) == "nothing to equalize: no channel can be rescaled against another"
    assert torch.equal(done.model[0].weight, net[0].weight)


def test_in_place_or_a_copy():
    net, x = chain(), torch.randn(4, 5)
    before = copy.deepcopy(net.state_dict())
    done = osp.equalize(net, x)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    same = osp.equalize(net, x, inplace=True)
    assert same.model is net
    assert torch.equal(net[0].weight, done.model[0].weight)


def test_a_tied_weight_that_reads_and_writes_keeps_the_function():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.outside = nn.Linear(6, 4, bias=False), nn.Linear(4, 6, bias=False)
            self.outside.weight = nn.Parameter(self.inside.weight.t().contiguous())
            self.again = nn.Linear(6, 4, bias=False)
            self.again.weight = self.inside.weight

        def forward(self, x):
            return self.again(self.outside(self.inside(x).relu()).relu())

    torch.manual_seed(0)
    net, x = Tied(), torch.randn(3, 6)
    done = osp.equalize(net, x)
    torch.testing.assert_close(done.model(x), net(x), rtol=1e-5, atol=1e-6)
    assert done.model.again.weight is done.model.inside.weight


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective": "best"}, "objective"),
        ({"modes": "all"}, "modes"),
        ({"bits": 1}, "bits is a whole number from 2 to 16, got 1"),
        ({"bits": 8.0}, "bits is a whole number"),
        ({"grid": "row"}, "grid is 'tensor', 'channel' or a number"),
        ({"grid": 0}, "grid is"),
        ({"args": None}, "give inputs"),
        ({"args": torch.ones(2, 7)}, "mat1 and mat2"),
        ({"tolerance": 0.0}, "more than 0e\\+00, so the model is left"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_changes(change, words):
    net = chain()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(EqualizeError, match=words) as caught:
        osp.equalize(net, **{"args": torch.randn(4, 5), "inplace": True, **change})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_nan_is_refused():
    net = chain()
    with torch.no_grad():
        net[2].weight[0, 0] = torch.nan
    with pytest.raises(EqualizeError, match=r"'2\.weight' holds NaN"):
        osp.equalize(net, torch.randn(4, 5))


def test_half_precision_keeps_its_type():
    net = chain().bfloat16()
    done = osp.equalize(net, torch.randn(4, 5, dtype=torch.bfloat16))
    assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("balance", [EQUAL_RANGES, LEAST_NORM])
def test_exponents_other_than_one_are_balanced(balance):
    """A square law: the second weight falls by the square of what the first one gains."""
    up = Slices("a", Fraction(1), (0,), torch.tensor([[0], [1]]))
    down = Slices("b", Fraction(-2), (0,), torch.tensor([[0], [1]]))
    state = {"a": torch.tensor([[8.0], [1.0]]).double(), "b": torch.tensor([[1.0], [9.0]]).double()}
    family = Family((up, down), 2)
    (t,) = balanced(state, [family], balance, state)
    now = moved(state, [(family, t)])
    a, b = now["a"][:, 0], now["b"][:, 0]
    torch.testing.assert_close(*((a, b) if balance is EQUAL_RANGES else (a**2, 2 * b**2)))


def test_rounding_is_that_of_the_format():
    weight = torch.randn(4, 12, dtype=torch.float64)
    for bits in (2, 4, 8):
        for grid, parts in (("tensor", 1), ("channel", 4), (3, 16)):
            found = rounded(weight, bits, grid).reshape(parts, -1)
            flat = weight.reshape(parts, -1)
            step = flat.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            whole = found / step
            assert torch.allclose(whole, whole.round(), atol=1e-9)
            assert (whole.abs() <= 2 ** (bits - 1) - 1 + 1e-9).all()
            assert ((found - flat).abs() <= step / 2 + 1e-12).all()
    assert loss(torch.zeros(2, 3), 8) == 0
    assert loss(torch.tensor([[1.0, 0.0], [0.001, 0.0]]), 8) == pytest.approx(0.5)


def test_no_warning_on_a_plain_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        osp.equalize(chain(), torch.randn(4, 5), objective="quantization")


def test_a_norm_that_is_the_identity_stands_between_two_maps() -> None:
    """As in the file that the command line writes: BatchNorm folded, its class kept."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        net(x)
        net[1].weight.copy_(torch.logspace(-2, 2, 6))
        net[1].bias.normal_()
    there = osp.fold(net.eval(), x, keep_modules=True).model
    done = osp.equalize(there, x, modes="current")
    (family,) = done.report.families
    assert {"0.weight", "3.weight"} <= set(family.names)
    assert "1.weight" not in family.names
    ranges = [
        t.abs().amax(d)
        for t, d in ((done.model[0].weight, (1, 2, 3)), (done.model[3].weight, (0, 2, 3)))
    ]
    torch.testing.assert_close(*ranges)
    torch.testing.assert_close(done.model(x), net(x), rtol=1e-4, atol=1e-5)
    both = osp.equalize(there, x)
    assert not both.report.families
    assert "fold them, or keep the function in the current mode only" in str(both)
