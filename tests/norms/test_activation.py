"""Activation norms against torch.nn: outputs, gradients, running statistics, state dicts."""

from functools import partial

import pytest
import torch
from torch import nn

from onsphere.norms import METHODS, ActivationNorm

C, SIDE = 6, 4


class L1BatchNorm(nn.BatchNorm2d):
    """The mean absolute deviation in place of the standard one; its square is followed."""

    def forward(self, x):
        mean = self.running_mean
        deviation = self.running_var**0.5
        if self.training:
            mean = x.mean((0, 2, 3))
            deviation = (x - mean[:, None, None]).abs().mean((0, 2, 3)) * (torch.pi / 2) ** 0.5
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.mul_(0.9).add_(0.1 * mean)
                self.running_var.mul_(0.9).add_(0.1 * deviation**2)
        y = (x - mean[:, None, None]) / (deviation + self.eps)[:, None, None]
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class FilterResponseNorm(nn.Module):
    def __init__(self, channels, dtype=None):
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.ones(channels, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=dtype))

    def forward(self, x):
        nu2 = (x**2).mean((2, 3), keepdim=True)
        y = x * torch.rsqrt(nu2 + self.eps)
        return self.weight.view(1, -1, 1, 1) * y + self.bias.view(1, -1, 1, 1)


class ScaleNorm(nn.Module):
    def __init__(self, width, dtype=None):
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.tensor(width**0.5, dtype=dtype))

    def forward(self, x):
        return x * (self.weight / torch.norm(x, dim=-1, keepdim=True).clamp(min=self.eps))


class PixelNorm(nn.Module):
    def __init__(self, _, dtype=None):
        super().__init__()
        self.eps = 1e-8

    def forward(self, x):
        return x / torch.sqrt((x**2).mean(1, keepdim=True) + self.eps)


# (ours, torch.nn's or the formula, shape of the input)
CASES = {
    "bn-2d": (partial(ActivationNorm, "bn", C), partial(nn.BatchNorm2d, C), (5, C, SIDE, SIDE)),
    "bn-1d": (partial(ActivationNorm, "bn", C), partial(nn.BatchNorm1d, C), (5, C)),
    "bn-3d": (partial(ActivationNorm, "bn", C), partial(nn.BatchNorm3d, C), (3, C, 2, 2, 2)),
    "bn-plain": (
        partial(ActivationNorm, "bn", C, affine=False, track_running_stats=False),
        partial(nn.BatchNorm2d, C, affine=False, track_running_stats=False),
        (5, C, SIDE, SIDE),
    ),
    "bn-cumulative": (
        partial(ActivationNorm, "bn", C, momentum=None),
        partial(nn.BatchNorm2d, C, momentum=None),
        (5, C, SIDE, SIDE),
    ),
    "ln": (
        partial(ActivationNorm, "ln", (C, SIDE, SIDE)),
        partial(nn.LayerNorm, (C, SIDE, SIDE)),
        (5, C, SIDE, SIDE),
    ),
    "ln-tokens": (partial(ActivationNorm, "ln", C), partial(nn.LayerNorm, C), (5, 7, C)),
    "in": (
        partial(ActivationNorm, "in", C),
        partial(nn.InstanceNorm2d, C),
        (5, C, SIDE, SIDE),
    ),
    "in-affine-tracked": (
        partial(ActivationNorm, "in", C, affine=True, track_running_stats=True),
        partial(nn.InstanceNorm2d, C, affine=True, track_running_stats=True),
        (5, C, SIDE, SIDE),
    ),
    "gn": (
        partial(ActivationNorm, "gn", C, num_groups=2),
        partial(nn.GroupNorm, 2, C),
        (5, C, SIDE, SIDE),
    ),
    "rms": (partial(ActivationNorm, "rms", C), partial(nn.RMSNorm, C), (5, 7, C)),
    "rms-eps": (
        partial(ActivationNorm, "rms", C, eps=1e-3),
        partial(nn.RMSNorm, C, eps=1e-3),
        (5, 7, C),
    ),
    "sbn": (
        partial(ActivationNorm, "sbn", C),
        partial(nn.SyncBatchNorm, C),
        (5, C, SIDE, SIDE),
    ),
    "l1bn": (partial(ActivationNorm, "l1bn", C), partial(L1BatchNorm, C), (5, C, SIDE, SIDE)),
    "frn": (partial(ActivationNorm, "frn", C), partial(FilterResponseNorm, C), (5, C, SIDE, SIDE)),
    "scale": (partial(ActivationNorm, "scale", C), partial(ScaleNorm, C), (5, 7, C)),
    "pixel": (partial(ActivationNorm, "pixel", C), partial(PixelNorm, C), (5, C, SIDE, SIDE)),
}


def pair(name, generator):
    """Ours and torch's in float64, with the same random affine parameters, loaded both ways."""
    make_ours, make_torch, shape = CASES[name]
    ours, theirs = make_ours(dtype=torch.float64), make_torch(dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1
    return ours, theirs, x


def gradients(module, x, seed):
    x = x.clone().requires_grad_()
    y = module(x)
    seeds = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * seeds).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name, generator):
    ours, theirs, x = pair(name, generator)
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        for a, b in zip(gradients(ours, x, 1), gradients(theirs, x, 1), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    for key, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], value, rtol=1e-14, atol=0), key


def test_every_activation_row_has_a_case():
    rows = {key for key, row in METHODS.items() if row.normalizes == "activation"}
    assert rows == {name.split("-")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_the_lemma(name, generator):
    ours, _, x = pair(name, generator)
    ours.train()
    assert torch.allclose(ours(x), ours.reference(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in CASES if "plain" not in n and n != "in"])
def test_defaults_are_those_of_torch(name):
    make_ours, make_torch, _ = CASES[name]
    ours, theirs = make_ours(), make_torch()
    assert ours.eps == theirs.eps
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
        assert ours.state_dict()[key].dtype == value.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ln", "gn", "rms", "bn-2d"])
def test_half_precision_follows_torch(name, dtype, generator):
    make_ours, make_torch, shape = CASES[name]
    x = torch.randn(shape, generator=generator).to(dtype)
    ours, theirs = make_ours(dtype=dtype), make_torch(dtype=dtype)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationNorm("bnn", 3), "did you mean 'bn'.*: bn, ln"),
        (lambda: ActivationNorm("wn", 3), "parametrize"),
        (lambda: ActivationNorm("gn", 6), "groups that divide 6"),
        (lambda: ActivationNorm("gn", 6, num_groups=4), "groups that divide 6"),
        (lambda: ActivationNorm("bn", (3, 4)), "number of channels"),
        (lambda: ActivationNorm("bn", 0), "positive size"),
        (lambda: ActivationNorm("bn", 4, num_groups=2), "has no groups"),
        (lambda: ActivationNorm("ln", 4, track_running_stats=True), "no running statistics"),
        (lambda: ActivationNorm("frn", 4, track_running_stats=True), "no running statistics"),
        (lambda: ActivationNorm("pixel", 4, affine=True), "no gain or shift"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_value_per_channel_is_refused_in_training_as_torch_does():
    for key in ("bn", "sbn", "l1bn"):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            ActivationNorm(key, 3)(torch.zeros(1, 3))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 8, 8), (3,)])
def test_unbatched_inputs_and_other_channels_are_refused(shape):
    for key in ("bn", "in"):
        with pytest.raises(ValueError, match=r"expects .batch, 3 channels"):
            ActivationNorm(key, 3)(torch.zeros(shape))


def test_checkpoints_without_a_batch_count_load_as_in_torch():
    old = {k: v for k, v in nn.BatchNorm2d(C).state_dict().items() if "tracked" not in k}
    for module in (nn.BatchNorm2d(C), ActivationNorm("bn", C)):
        module.load_state_dict(old)
        assert module.num_batches_tracked == 0


@pytest.mark.parametrize("name", CASES)
def test_reset_makes_it_new(name, generator):
    ours, _, x = pair(name, generator)
    ours.train()(x)
    ours.reset_parameters()
    for key, value in CASES[name][0]().state_dict().items():
        assert torch.allclose(ours.state_dict()[key].to(value), value, rtol=1e-7, atol=0), key


def test_repr_names_the_method():
    assert repr(ActivationNorm("gn", 8, num_groups=2)) == (
        "ActivationNorm('gn', 8, num_groups=2, eps=1e-05, affine=True)"
    )


def test_a_method_without_gain_learns_none():
    module = ActivationNorm("pixel", C)
    assert list(module.state_dict()) == []
    assert module(torch.ones(2, C, 3, 3)).shape == (2, C, 3, 3)


def test_one_scalar_starts_at_the_length_of_a_root_mean_square():
    assert ActivationNorm("scale", (2, 8)).weight.item() == 4.0
