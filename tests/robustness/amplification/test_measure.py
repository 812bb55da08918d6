"""Gains, singular values and the rescaled control against closed forms."""

import copy
import json

import pytest
import torch
from torch import nn

from onsphere.robustness import amplification, margin_slope, spectral_norm
from onsphere.robustness.amplification.effective_layers import effective_layers
from onsphere.robustness.amplification.gains import gains, passed
from onsphere.robustness.amplification.layer_trace import LayerTraceError
from onsphere.robustness.amplification.singular_values import is_affine

SHARED = ("relative", "effective", "alignment", "singular")  # what no rescale moves
SCALES = ("absolute", "incremental", "weight_norm")
FEW = {"n_power_iterations": 10}  # of power iteration, where singular values are not the point


def draw(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def linear(rows, columns, generator, bias=True):
    layer = nn.Linear(columns, rows, bias=bias).double()
    for p in layer.parameters():
        p.data = draw(p.shape, generator)
    return layer


def trained(net, x):
    """Give normalizations statistics and gains of their own, and evaluation mode."""
    net.double().train()
    for _ in range(3):
        net(x)
    for n, p in net.named_parameters():
        if p.ndim == 1 and n.endswith("weight"):
            p.data += 0.5 * torch.linspace(-1, 1, len(p), dtype=p.dtype)
    return net.eval()


@pytest.fixture
def conv_net(generator):
    """Conv-BN twice, a strided and grouped one among them, then linear-LN and a head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=1e-30),
            nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2, groups=2),
            nn.BatchNorm2d(6, eps=1e-30), nn.ReLU(), nn.Flatten(), nn.Linear(54, 8),
            nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5),
        )  # fmt: skip
    x = torch.rand(20, 2, 8, 8, generator=generator, dtype=torch.float64)
    return trained(net, x), x, 0.05 * draw(x.shape, generator)


def rescaled(net, factors):
    """Multiply convolutions before BatchNorm, and keep the function."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for i, f in factors.items():
            for p in twin[i].parameters():
                p.mul_(f)
            twin[i + 1].running_mean.mul_(f)
            twin[i + 1].running_var.mul_(f * f)
    return twin


def matrix_of(layer, shape):
    """The matrix of an affine layer, column by column."""
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, *shape)
    return (layer(units) - layer(torch.zeros_like(units))).flatten(1).T.detach()


# --- singular values ------------------------------------------------------------------------

LAYERS = {
    "linear": (nn.Linear(6, 4), (6,)),
    "conv": (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 5)),
    "strided, grouped, dilated": (nn.Conv2d(2, 4, 2, stride=2, groups=2, dilation=2), (2, 6, 6)),
    "circular": (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 7)),
    "transposed": (nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 3, 3)),
    "pooling": (nn.AvgPool2d(2), (2, 4, 4)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_the_largest_singular_value_is_that_of_the_matrix(layer, shape, generator):
    layer = copy.deepcopy(layer).double()
    for p in layer.parameters():
        p.data = draw(p.shape, generator)
    value, vector = spectral_norm(
        layer, torch.zeros(1, *shape, dtype=torch.float64), n_power_iterations=500
    )
    _, exact, right = torch.linalg.svd(matrix_of(layer, shape))
    torch.testing.assert_close(value, exact[:1], rtol=1e-5, atol=0)
    if exact[0] > 1.001 * exact[1]:
        assert abs(float(vector.flatten() @ right[0])) > 1 - 1e-4
    assert all(p.grad is None for p in layer.parameters())


def test_singular_values_of_a_normalization_are_those_of_its_jacobian_at_each_example(generator):
    layer = nn.Sequential(linear(5, 6, generator), nn.LayerNorm(5).double())
    x = draw((3, 6), generator)
    value, _ = spectral_norm(layer, x, n_power_iterations=500)
    exact = [torch.linalg.matrix_norm(torch.func.jacrev(layer)(row), 2) for row in x]
    torch.testing.assert_close(value, torch.stack(exact), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_which_layers_are_affine(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        affine = [nn.Linear(6, 4), nn.BatchNorm1d(6).eval(), nn.Identity(), nn.Dropout().eval()]
        others = [nn.ReLU(), nn.Tanh(), nn.LayerNorm(6), nn.MaxPool1d(2), nn.Softmax(1), nn.ELU()]
        others += [nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU())]
        at = torch.randn(2, 6).to(dtype)
    assert [is_affine(layer.to(dtype), at) for layer in affine] == [True] * len(affine)
    assert [is_affine(layer.to(dtype), at) for layer in others] == [False] * len(others)


def test_the_value_is_never_too_large_and_a_layer_of_zeros_has_none(generator):
    layer, zeros = linear(30, 30, generator), torch.zeros(1, 30, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(layer.weight.detach(), 2)
    found = [float(spectral_norm(layer, zeros, n_power_iterations=n)[0]) for n in (1, 5, 50)]
    assert found == sorted(found)
    assert found[-1] <= float(exact) * (1 + 1e-12)
    layer.weight.data.zero_()
    value, vector = spectral_norm(layer, zeros)
    assert float(value) == 0
    assert float(vector.norm()) == pytest.approx(1)


def test_what_cannot_be_differentiated_is_refused():
    with pytest.raises(ValueError, match="differentiably"):
        spectral_norm(lambda x: x.detach(), torch.zeros(1, 2))


# --- effective layers -------------------------------------------------------------------------


def effective_of(net, x):
    steps, _ = passed(net, x)
    found = effective_layers(
        [s.call for s in steps], [s.given for s in steps], n_power_iterations=500
    )
    return {steps[e.start].call.name: e for e in found}


def test_batchnorm_is_folded_into_the_convolution_before_it(conv_net):
    net, x, _ = conv_net
    found = effective_of(net, x[:2])
    assert {n: e.through for n, e in found.items()} == {"0": "1", "3": "4", "7": "8", "10": ""}
    assert [e.affine for e in found.values()] == [True, True, False, True]
    for name, shape in (("0", (2, 8, 8)), ("3", (4, 8, 8))):
        conv, norm = copy.deepcopy(net[int(name)]), net[int(name) + 1]
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        conv.weight.data *= gain.detach()[:, None, None, None]
        exact = torch.linalg.matrix_norm(matrix_of(conv, shape), 2)
        torch.testing.assert_close(found[name].singular, exact[None], rtol=1e-5, atol=0)


class Block(nn.Module):
    """A normalization that does not take a layer's output as it is, layers that run twice."""

    def __init__(self, generator):
        super().__init__()
        self.inner, self.norm = linear(4, 4, generator), nn.BatchNorm1d(4).double()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True).double()
        self.read = nn.LSTM(4, 3).double()  # its batch comes second
        self.head = linear(3, 4, generator)

    def forward(self, x):
        h = self.inner(self.inner(x)).relu_()
        h = self.norm(h) + x
        seen, _ = self.attend(h[:, None], h[:, None], h[:, None])
        self.read(seen.transpose(0, 1))
        return self.head(seen[:, 0])


def test_layers_that_run_twice_tuples_and_what_does_not_follow(generator):
    net, x = Block(generator).eval(), draw((3, 4), generator)
    result = amplification(net, x, 0.1 * draw(x.shape, generator))
    names = ["inner", "inner (2)", "norm", "attend", "head"]
    assert [layer.name for layer in result.layers] == names
    through = {layer.name: layer.through for layer in result.layers if layer.singular}
    assert through == dict.fromkeys(("inner", "inner (2)", "norm", "head"), "")
    assert any("attend: of several outputs the first" in note for note in result.notes)
    assert any("read left out: shape (1, 3, 4)" in note for note in result.notes)


# --- gains ------------------------------------------------------------------------------------


def test_a_linear_network_has_closed_forms(generator):
    first, second = linear(5, 4, generator, bias=False), linear(3, 5, generator, bias=False)
    net, x = nn.Sequential(first, second), draw((40, 4), generator)
    right = torch.linalg.svd(first.weight.detach())[2][0]
    result = amplification(net, x, 0.3 * right.expand_as(x), n_power_iterations=500)
    before, after = result.layers
    top = float(torch.linalg.matrix_norm(first.weight.detach(), 2))
    product = second.weight.detach() @ first.weight.detach()
    expected = {"absolute": top, "incremental": top, "effective": top, "alignment": 1.0}
    for measure, value in expected.items():
        found = before.adversarial[measure]
        assert (found.low, found.middle, found.high) == pytest.approx((value,) * 3, rel=1e-6)
    assert before.singular.middle == pytest.approx(top, rel=1e-9)
    assert before.weight_norm == pytest.approx(float(first.weight.detach().norm()))
    total = float((product @ right).norm())
    assert after.adversarial["absolute"].middle == pytest.approx(total)
    assert after.adversarial["incremental"].middle == pytest.approx(total / top)
    lengths = (x @ product.T).norm(dim=1)
    relative = (total * x.norm(dim=1) / lengths).median()
    assert after.adversarial["relative"].middle == pytest.approx(float(relative), rel=0.1)
    assert result.size.middle == pytest.approx(0.3)


def test_where_nothing_was_put_in_there_is_no_gain():
    """An input of zeros has no share to compare with, a perturbation of zeros no gain."""
    net = nn.Linear(2, 2)
    x, delta = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.1, 0.1], [0.0, 0.0]])
    steps, _ = passed(net, x)
    (found,) = gains(net, steps, x, delta, {})
    assert found["relative"].isnan().tolist() == [True, True]
    assert found["absolute"].isnan().tolist() == [False, True]


def test_random_perturbations_gain_what_theory_says(generator):
    """E|W u|² = |W|²/n for uniform directions u, and every one has the length of its neighbour."""
    layer = linear(50, 60, generator, bias=False)
    x = draw((100, 60), generator)
    sizes = torch.linspace(0.1, 10, 100, dtype=torch.float64)[:, None]
    result = amplification(layer, x, sizes * draw(x.shape, generator).sign(), draws=5)
    (found,) = result.layers
    expected = float(layer.weight.detach().norm()) / 60**0.5
    assert found.random["absolute"].middle == pytest.approx(expected, rel=0.03)
    assert found.excess == pytest.approx(1, rel=0.05)
    again = amplification(layer, x, sizes * draw(x.shape, generator).sign(), draws=5)
    assert again.layers[0].random == found.random  # the same seed


def test_batches_do_not_matter(conv_net):
    net, x, delta = conv_net
    whole = amplification(net, x, delta, draws=0, **FEW)
    parts = amplification(net, x, delta, draws=0, batch_size=7, **FEW)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        for measure, found in one.adversarial.items():
            assert other.adversarial[measure].middle == pytest.approx(found.middle, rel=1e-9)


def test_chosen_layers(conv_net):
    net, x, delta = conv_net
    result = amplification(nn.Sequential(net[:6], net[6:]), x, delta, layers=["0", "1.10"], **FEW)
    assert [layer.kind for layer in result.layers] == ["Sequential", "Linear"]
    with pytest.raises(LayerTraceError, match="no module 'convs'"):
        amplification(net, x, delta, layers=["convs"])


# --- at the logits -----------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
def test_slope_and_distance_of_a_linear_classifier(norm, dual, generator):
    net, x = linear(2, 6, generator), draw((30, 6), generator)
    y = net(x).argmax(1)
    found = margin_slope(net, x, y, norm=norm, batch_size=7)
    gap = net.weight.detach()[0] - net.weight.detach()[1]
    torch.testing.assert_close(found.slope, gap.norm(dual).expand(30))
    nearest = x - found.distance[:, None] * (gap if norm == "l2" else gap.sign()) * torch.where(
        y == 0, 1, -1
    )[:, None] / (gap.norm() if norm == "l2" else 1)
    torch.testing.assert_close(
        net(nearest).diff(dim=1).squeeze(1), torch.zeros(30, dtype=torch.float64), atol=1e-9, rtol=0
    )
    wrong = margin_slope(net, x, 1 - y, norm=norm)
    torch.testing.assert_close(wrong.distance, -found.distance)
    assert amplification(net, x, x, y=y, norm=norm).slope.middle == pytest.approx(
        float(gap.norm(dual))
    )


def test_a_flat_margin_is_infinitely_far_and_counted(generator):
    net = nn.Sequential(nn.Flatten(), linear(3, 4, generator))
    net[1].weight.data.zero_()
    x = draw((5, 4), generator)
    result = amplification(net, x, x)
    assert (result.flat, result.distance.middle) == (1.0, float("inf"))
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["distance"]["middle"] == "inf"


# --- the rescaled control -------------------------------------------------------------------------


def test_powers_of_two_before_batchnorm_move_bookkeeping_and_nothing_else(conv_net):
    net, x, delta = conv_net
    twin = rescaled(net, {0: 8.0, 3: 0.25})
    one = amplification(net, x, delta, draws=1, **FEW)
    other = amplification(twin, x, delta, draws=1, **FEW)
    for i, (before, after) in enumerate(zip(one.layers, other.layers, strict=True)):
        f = {0: 8.0, 3: 0.25}.get(i, 1.0)
        assert after.singular == before.singular  # to the last bit
        for measure in before.adversarial.keys() & set(SHARED):
            assert after.adversarial[measure] == before.adversarial[measure]
            assert after.random[measure] == before.random[measure]
        moved = before.adversarial["absolute"].middle * f
        assert after.adversarial["absolute"].middle == moved
    assert one.slope == other.slope


def test_the_control_marks_what_moves(conv_net):
    net, x, delta = conv_net
    twin = rescaled(net, {0: 8.0, 3: 0.25})
    result = amplification(net, x, delta, control=lambda _: twin, **FEW)
    marked = {layer.name: layer.bookkeeping for layer in result.layers if layer.bookkeeping}
    before, after = ("absolute", "incremental", "weight_norm"), ("incremental",)
    assert marked == {"0": before, "1": after, "3": before, "4": after}
    assert result.layers[0].control["absolute"] == 8
    assert result.layers[4].control["incremental"] == 4
    assert (result.control.change, result.control.slope, result.control.distance) == (0, 1, 1)
    assert set(result.bookkeeping) == set(SCALES)
    assert "Not moved at any layer: relative, effective, singular, alignment" in " ".join(
        str(result).split()
    )
    assert str(result).count("~") == 2 * 3 + 2 + 1


def test_a_copy_that_is_another_function_is_called_that(conv_net):
    net, x, delta = conv_net
    twin = copy.deepcopy(net)
    twin[10].weight.data *= 2
    result = amplification(net, x, delta, control=twin, **FEW)
    assert result.control.change > 0.1
    assert "does not compute the same function" in str(result)
    assert result.layers[-1].control["singular"] == 2
    with pytest.raises(LayerTraceError, match="runs other layers"):
        amplification(net, x, delta, control=nn.Sequential(net, nn.Identity()), **FEW)


# --- the model is left alone, and mistakes are told ---------------------------------------------


def state_of(net):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    return hooks, [m.training for m in net.modules()], [p.grad for p in net.parameters()]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training, conv_net):
    net, x, delta = conv_net
    net.train(training)
    net[4].eval()
    before, values = state_of(net), copy.deepcopy(net.state_dict())
    amplification(net, x, delta, **FEW)
    assert state_of(net) == before
    for name, value in net.state_dict().items():
        assert torch.equal(value, values[name])


class Fragile(nn.Module):
    """Raises, or takes another path, where an input is large."""

    def __init__(self, raises):
        super().__init__()
        self.raises, self.one, self.two = raises, nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        large = bool(x.max() > 5)
        if large and self.raises:
            raise ZeroDivisionError
        return self.two(self.one(x)) if large else self.one(x)


@pytest.mark.parametrize(
    ("raises", "error", "says"),
    [(True, ZeroDivisionError, None), (False, LayerTraceError, "another path through the model")],
)
def test_hooks_are_gone_after_an_error(raises, error, says):
    net = Fragile(raises).train()
    before = state_of(net)
    with pytest.raises(error, match=says):
        amplification(net, torch.ones(3, 4), 10 * torch.ones(3, 4))
    assert state_of(net) == before
    assert float(net.runs) == 0


def test_a_model_with_noise_of_its_own_is_noted(generator):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn(x.shape, generator=generator)

    net = nn.Sequential(nn.Linear(4, 4), Noisy())
    result = amplification(net, torch.ones(3, 4), torch.ones(3, 4))
    assert any("1 returns another output for the same input" in note for note in result.notes)


MISTAKES = {
    "shapes": (torch.ones(3, 4), torch.ones(3, 5), {}, "perturbations are like them"),
    "integers": (torch.ones(3, 4).long(), torch.ones(3, 4).long(), {}, "floating point"),
    "nothing": (torch.ones(3, 4), torch.zeros(3, 4), {}, "every perturbation is 0"),
    "labels": (torch.ones(3, 4), torch.ones(3, 4), {"y": torch.ones(2).long()}, "one label"),
    "classes": (torch.ones(3, 4), torch.ones(3, 4), {"y": 7 * torch.ones(3).long()}, "2 classes"),
}


@pytest.mark.parametrize(("x", "delta", "more", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(x, delta, more, says):
    with pytest.raises(ValueError, match=says):
        amplification(nn.Linear(4, 2), x, delta, **more)


def test_examples_without_a_perturbation_are_left_out_and_counted(generator):
    x = draw((6, 4), generator)
    delta = draw((6, 4), generator)
    delta[::2] = 0
    result = amplification(linear(3, 4, generator), x, delta)
    assert (result.examples, result.unchanged) == (3, 3)
