"""Every option that is a word: capitals do not matter, and another word is one line."""

import pytest
import torch
from jaxtyping import config
from torch import nn

import onsphere as osp
from onsphere.errors import nearest
from onsphere.geometry import Sphere, SphereMap
from onsphere.report import Reference, Series

NAMES = ["growth", "gain", "sphere"]


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("grwth", "; did you mean 'growth'?"),
        ("GAIN", "; did you mean 'gain'?"),
        ("spheres", "; did you mean 'sphere'?"),
        ("xyzzy", "; there are: growth, gain, sphere"),
        ("", "; there are: growth, gain, sphere"),
    ],
)
def test_the_nearest_name_is_suggested_where_one_is_near(given, hint):
    text = nearest(given, NAMES)
    assert text.startswith(hint)
    assert text.endswith("here are: growth, gain, sphere")
    assert "\n" not in text


def _weight():
    return nn.Parameter(torch.eye(3))


def _on_sphere(**options):
    weight = _weight()
    return osp.optim.on_sphere(torch.optim.SGD([weight], lr=0.1), {weight: Sphere()}, **options)


def _groups(kind, **options):
    return kind([{"params": [_weight()], "sphere": Sphere()} | options], lr=0.1).param_groups[0]


def _net():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return net, osp.audit(net, torch.eye(4)), torch.optim.SGD(net.parameters(), lr=0.1)


def _monitored(spheres="matrices", **options):
    net, _, optimizer = _net()
    with osp.Monitor(net, optimizer, spheres) as monitor:
        return monitor.latest(**options)


def _attacked(attack, **options):
    torch.manual_seed(0)
    net, x = nn.Linear(6, 3), torch.rand(4, 6)
    return attack(net, x, net(x).argmax(1), **options)


def _evaluated(**options):
    return _attacked(lambda net, x, y, **o: osp.robustness.evaluate(net, (x, y), **o), **options)


def _amplified(**options):
    x = torch.rand(4, 6)
    return osp.robustness.amplification(nn.Linear(6, 3), x, 0.1 * torch.rand(4, 6), **options)


R = osp.robustness
OPTIONS = {
    "lr_mode": (lambda v: _groups(osp.optim.SphereSGD, lr_mode=v)["lr_mode"], "angle"),
    "retraction": (lambda v: _groups(osp.optim.SphereSGD, retraction=v), "exponential"),
    "nonfinite": (lambda v: _groups(osp.optim.SphereAdamW, nonfinite=v), "raise"),
    "second_moment": (lambda v: _groups(osp.optim.SphereAdamW, second_moment=v), "vector"),
    "default": (lambda v: osp.optim.SphereSGD([_weight()], lr_mode=v).defaults["lr_mode"], "rate"),
    "mode": (lambda v: _on_sphere(mode=v).mode, "rotate"),
    "base nonfinite": (lambda v: _on_sphere(nonfinite=v).nonfinite, "ignore"),
    "fix": (lambda v: _fixed(v), "maximal"),
    "radius": (lambda v: _canonical(radius=v), "unit"),
    "factors": (lambda v: _canonical(factors=v), "binary"),
    "modes": (lambda v: _canonical(modes=v), "audited"),
    "spheres": (lambda v: list(_monitored(v)), "matrices"),
    "by": (lambda v: _monitored(by=v), "kind"),
    "norm": (lambda v: _attacked(R.pgd, eps=0.1, norm=v), "linf"),
    "norm of fgsm": (lambda v: _attacked(R.fgsm, eps=0.1, norm=v), "l2"),
    "norm of slopes": (lambda v: _attacked(R.margin_slope, norm=v).slope, "linf"),
    "norm of gains": (lambda v: _amplified(norm=v).norm, "linf"),
    "norm of evaluate": (lambda v: _evaluated(eps=0.1, norm=v).settings["norm"], "linf"),
    "attacks": (lambda v: _evaluated(eps=0.1, attacks=v).settings["attacks"], "quick"),
    "loss": (lambda v: _attacked(R.pgd, eps=0.1, loss=v), "dlr"),
    "loss of apgd": (lambda v: _attacked(R.apgd, eps=0.1, loss=v), "dlr"),
    "method": (lambda v: osp.norms.method(v).key, "gn"),
    "eps_place": (lambda v: SphereMap(eps_place=v), "outside"),
    "norm of a map": (lambda v: SphereMap(norm=v), "spectral"),
    "recipe": (lambda v: str(osp.sphere_recipe(v, lr=0.1, weight_decay=0.1)), "adamw"),
    "schedule": (lambda v: osp.planning.Schedule(10, v), "cosine"),
    "style": (lambda v: Series("a", [1.0], [1.0], style=v), "points"),
    "kind of a line": (lambda v: Reference(v), "diagonal"),
}


def _fixed(value):
    net, audit, _ = _net()
    return sorted(g["names"] for g in audit.param_groups(net, fix=value))


def _canonical(**options):
    torch.manual_seed(0)
    net, audit, _ = _net()
    return osp.canonicalize(net, audit, tolerance=1.0, **options)[0].weight.detach()


@pytest.fixture
def no_types_checked():
    """The tests check annotations at run time, which users do not."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("no_types_checked")
@pytest.mark.parametrize(("use", "word"), OPTIONS.values(), ids=OPTIONS.keys())
def test_the_word_of_an_option_has_any_capitals_and_another_is_one_line(use, word):
    torch.manual_seed(0)
    usual = use(word)
    torch.manual_seed(0)
    other = use(word.capitalize())
    if isinstance(usual, torch.Tensor):
        assert torch.equal(usual, other)
    elif not isinstance(usual, dict):
        assert usual == other
    for wrong in ("xyzzy", 3):
        with pytest.raises((ValueError, osp.errors.OnsphereError)) as raised:
            use(wrong)
        text = str(raised.value)
        assert word in text
        assert repr(wrong) in text or type(wrong).__name__ in text
        assert "\n" not in text
