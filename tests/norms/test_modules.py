"""Modules that are no single projection, against the formulas of their papers, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onsphere.norms import (
    ActivationNorm,
    BatchRenorm,
    CosineLinear,
    DynamicTanh,
    EvoNormS0,
    GlobalResponseNorm,
    ModulatedConv2d,
    QKNorm,
    RobustNorm,
    SwitchableNorm,
    ThresholdedLinearUnit,
    dora,
)

C, SIDE = 6, 4


def at(values):
    return values.view(1, -1, 1, 1)


def batch_renorm(m, x):
    """Algorithm 1; in eval mode the last lines alone."""
    if not m.training:
        y = (x - at(m.running_mean)) / at(m.running_std)
        return at(m.weight) * y + at(m.bias)
    mu, sigma = x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + m.eps).sqrt()
    r = (sigma / m.running_std).clamp(1 / m.r_max, m.r_max).detach()
    d = ((mu - m.running_mean) / m.running_std).clamp(-m.d_max, m.d_max).detach()
    return at(m.weight) * ((x - at(mu)) / at(sigma) * at(r) + at(d)) + at(m.bias)


def robust_norm(m, x):
    if m.training:
        flat = x.transpose(0, 1).flatten(1)
        mean, extent = flat.mean(1), flat.max(1).values - flat.min(1).values
    else:
        mean, extent = m.running_mean, m.running_range
    return at(m.weight) * (x - at(mean)) / (at(extent) ** m.power + m.eps) + at(m.bias)


def switchable_norm(m, x):
    """Moments of BatchNorm and LayerNorm from those of InstanceNorm, as the paper has them."""
    mean_in = x.mean((2, 3), keepdim=True)
    var_in = (x - mean_in).square().mean((2, 3), keepdim=True)
    moment = var_in + mean_in**2
    mean_ln, mean_bn = mean_in.mean(1, keepdim=True), mean_in.mean(0, keepdim=True)
    var_ln = moment.mean(1, keepdim=True) - mean_ln**2
    var_bn = moment.mean(0, keepdim=True) - mean_bn**2
    if not m.training:
        mean_bn, var_bn = at(m.running_mean), at(m.running_var)
    a, b = m.mean_weight.exp(), m.var_weight.exp()
    mean = (a[0] * mean_in + a[1] * mean_ln + a[2] * mean_bn) / a.sum()
    var = (b[0] * var_in + b[1] * var_ln + b[2] * var_bn) / b.sum()
    return at(m.weight) * (x - mean) / (var + m.eps).sqrt() + at(m.bias)


def evonorm(m, x):
    n, c, h, w = x.shape
    grouped = x.reshape(n, m.groups, c // m.groups, h, w)
    std = (grouped.var((2, 3, 4), unbiased=False, keepdim=True) + m.eps).sqrt()
    std = std.expand_as(grouped).reshape(n, c, h, w)
    return x * torch.sigmoid(at(m.v) * x) / std * at(m.weight) + at(m.bias)


def response_norm(m, x):
    """The paper's code, channels last."""
    x = x.permute(0, 2, 3, 1)
    g = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    n = g / (g.mean(dim=-1, keepdim=True) + m.eps)
    return (m.weight * (x * n) + m.bias + x).permute(0, 3, 1, 2)


def dynamic_tanh(m, x):
    e = torch.exp(2 * m.alpha * x)
    return m.weight * (e - 1) / (e + 1) + m.bias


def cosine(m, x):
    if m.map.centered:
        rows = torch.stack([torch.corrcoef(torch.stack([w, v]))[0, 1] for v in x for w in m.weight])
    else:
        rows = torch.stack([F.cosine_similarity(w, v, dim=0) for v in x for w in m.weight])
    return m.scale * rows.view(len(x), -1) + m.bias


IMAGES, VECTORS = (5, C, SIDE, SIDE), (5, C)
CASES = {
    "brn": (lambda: BatchRenorm(C), batch_renorm, IMAGES),
    "brn tight": (lambda: BatchRenorm(C, r_max=1.1, d_max=0.1), batch_renorm, IMAGES),
    "robust": (lambda: RobustNorm(C), robust_norm, IMAGES),
    "switch": (lambda: SwitchableNorm(C), switchable_norm, IMAGES),
    "evo": (lambda: EvoNormS0(C, groups=2), evonorm, IMAGES),
    "grn": (lambda: GlobalResponseNorm(C), response_norm, IMAGES),
    "tlu": (lambda: ThresholdedLinearUnit(C), lambda m, x: x.clamp_min(at(m.tau)), IMAGES),
    "dyt": (lambda: DynamicTanh(C), dynamic_tanh, VECTORS),
    "cos": (lambda: CosineLinear(C, 4, bias=True, scale=3.0), cosine, VECTORS),
    "cos centred": (lambda: CosineLinear(C, 4, bias=True, centered=True), cosine, VECTORS),
}


def randomized(module, generator):
    module = module.double()
    for value in module.parameters():
        value.data = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return module


def values_and_gradients(run, module, x):
    x = x.clone().requires_grad_()
    y = run(x)
    seeds = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y, *torch.autograd.grad((y * seeds).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula(name, generator):
    make, formula, shape = CASES[name]
    module = randomized(make(), generator)
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1
    for training in (True, True, False):
        module.train(training)
        expected = values_and_gradients(lambda z: formula(module, z), module, x)
        for a, b in zip(values_and_gradients(module, module, x), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["brn", "switch", "robust"])
def test_running_statistics_follow_the_batch(name, generator):
    module = CASES[name][0]().double()
    x = 2 * torch.randn(IMAGES, generator=generator, dtype=torch.float64) + 1
    flat, momentum = x.transpose(0, 1).flatten(1), module.momentum
    spread = {
        "brn": (flat.var(1, unbiased=False) + 1e-5).sqrt(),
        "switch": flat.var(1, unbiased=False),
        "robust": flat.max(1).values - flat.min(1).values,
    }[name]
    module.train()(x)
    _, running = list(module.buffers())
    assert torch.allclose(module.running_mean, momentum * flat.mean(1), rtol=1e-12)
    assert torch.allclose(running, (1 - momentum) + momentum * spread, rtol=1e-12)
    before = running.clone()
    module.eval()(x)
    assert torch.equal(running, before)


def test_batch_renorm_without_correction_is_batch_norm(generator):
    x = torch.randn(IMAGES, generator=generator)
    ours, theirs = BatchRenorm(C, r_max=1.0, d_max=0.0), nn.BatchNorm2d(C)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_batch_renorm_leaves_gradients_orthogonal_to_filters_that_have_no_sphere(generator):
    """Its correction is constant to the gradient: the norm grows although the scale counts."""
    conv = nn.Conv2d(3, C, 3, dtype=torch.float64)
    net = nn.Sequential(conv, BatchRenorm(C, eps=1e-30).double())
    x = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64)
    y = net(x)
    (gradient,) = torch.autograd.grad((y**3).sum(), conv.weight)
    radial = (gradient * conv.weight).sum((1, 2, 3)).abs()
    lengths = gradient.flatten(1).norm(dim=1) * conv.weight.flatten(1).norm(dim=1)
    assert bool((radial < 1e-12 * lengths).all())
    with torch.no_grad():
        conv.weight.mul_(1.5)
    assert not torch.allclose(net(x), y, rtol=0.1)


@pytest.mark.parametrize("method", ["rms", "ln", "l2"])
def test_qk_norm_normalizes_each_head(method, generator):
    q, k = torch.randn(2, 3, 2, 7, 4, generator=generator, dtype=torch.float64)
    norm = randomized(QKNorm(4, method=method), generator)
    found = norm(q, k)
    if method == "l2":
        expected = [norm.scale * q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)]
    else:
        torchs = {"rms": nn.RMSNorm, "ln": nn.LayerNorm}[method](4, eps=1e-6).double()
        expected = []
        for own, x in ((norm.q, q), (norm.k, k)):
            torchs.load_state_dict(own.state_dict())
            expected.append(torchs(x))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolution_sample_by_sample(demodulate, generator):
    conv = ModulatedConv2d(3, 5, 3, demodulate=demodulate).double()
    x = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64)
    style = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    for one, s, y in zip(x, style, conv(x, style), strict=True):
        weight = conv.weight * s.view(1, -1, 1, 1)
        if demodulate:
            weight = weight / (weight.pow(2).sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        assert torch.allclose(y, F.conv2d(one[None], weight, padding=1)[0], rtol=1e-10)


@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 5), lambda: nn.Conv2d(3, 5, 3)])
def test_dora_is_length_times_direction(make, generator):
    layer = make().double()
    frozen = layer.weight.detach().clone()
    dora(layer, rank=2, alpha=6.0)
    m, a, b = (
        layer.get_parameter(f"parametrizations.weight.0.{name}")
        for name in ("magnitude", "lora_A", "lora_B")
    )
    assert torch.allclose(layer.weight, frozen, rtol=1e-12)
    for value in (m, b):
        value.data = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    v = frozen + 3.0 * (b @ a).view_as(frozen)
    length = v.flatten(1).norm(dim=1).view(-1, *[1] * (v.ndim - 1))
    assert torch.allclose(layer.weight, m.view_as(length) * v / length, rtol=1e-12)
    assert not layer.parametrizations.weight.original.requires_grad


def test_dora_without_the_norms_gradient_has_a_radial_part(generator):
    gradients = {}
    for detached in (False, True):
        layer = nn.Linear(7, 5).double()
        dora(layer, rank=7, detach_norm=detached)
        original = layer.parametrizations.weight.original.requires_grad_()
        seeds = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (gradient,) = torch.autograd.grad((layer.weight * seeds).sum(), original)
        gradients[detached] = (gradient * original).sum(1).abs().max().item()
    assert gradients[False] < 1e-12 < 1e-3 < gradients[True]


def test_filter_response_norm_has_its_activation(generator):
    layer = nn.Sequential(ActivationNorm("frn", C), ThresholdedLinearUnit(C))
    x = torch.randn(IMAGES, generator=generator)
    assert layer(x).min() == 0
    assert torch.allclose(layer(100 * x), layer(x), atol=1e-4)


REFUSED = {
    "renorm limits": (lambda: BatchRenorm(3, r_max=0.5), "r_max is at least 1"),
    "renorm one value": (lambda: BatchRenorm(3)(torch.zeros(1, 3)), "more than 1 value"),
    "no channels": (lambda: RobustNorm(0), "num_features must be at least 1, got 0"),
    "power": (lambda: RobustNorm(3, power=0.0), "power must be positive"),
    "channels": (lambda: GlobalResponseNorm(3)(torch.zeros(2, 4)), r"3 channels.*got shape \(2, 4"),
    "no space": (lambda: SwitchableNorm(3)(torch.zeros(2, 3)), "needs space"),
    "groups": (lambda: EvoNormS0(6, groups=4), "groups that divide 6 channels, got groups=4"),
    "heads": (lambda: QKNorm(4)(torch.zeros(2, 4), torch.zeros(2, 5)), r"expects \(..., 4\)"),
    "method": (lambda: QKNorm(4, method="bn"), "method must be"),
    "inputs": (lambda: CosineLinear(3, 2)(torch.zeros(2, 4)), r"expects \(..., 3\)"),
    "kernel": (lambda: ModulatedConv2d(3, 3, 2), "kernel_size must be odd, got 2"),
    "styles": (
        lambda: ModulatedConv2d(3, 3, 3)(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3)),
        r"styles \(batch, 3\)",
    ),
    "weight": (lambda: dora(nn.Linear(2, 2), "kernel", rank=1), "no weight 'kernel'"),
    "rank": (lambda: dora(nn.Linear(2, 2), rank=0), "rank must be at least 1, got 0"),
    "size": (lambda: DynamicTanh(0), "positive size"),
    "trailing": (lambda: DynamicTanh(3)(torch.zeros(2, 4)), "dynamic tanh expects"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_scale_that_starts_as_the_paper_has_it():
    length = 49
    norm = QKNorm(4, method="l2", scale=math.log2(length**2 - length))
    assert norm.scale.item() == pytest.approx(11.2, abs=0.01)
