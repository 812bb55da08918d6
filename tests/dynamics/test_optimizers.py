"""The table of optimizers against the optimizers themselves."""

import pytest
import torch
from torch.optim._muon import _adjust_lr

from onsphere import dynamics as dyn
from onsphere.dynamics.optimizers import (
    CLASSES,
    LAWS,
    ON_SPHERES,
    OPTIMIZERS,
    Vector,
    law_of_class,
    muon_scale,
)

OURS = {"SGDW": dyn.SGDW, "Lion": dyn.Lion}


def group_of(kind: str, **settings) -> dict:
    """Return a param group of an optimizer by the name of its class."""
    make = OURS[kind] if kind in OURS else getattr(torch.optim, kind)
    return make([torch.nn.Parameter(torch.ones(4, 2))], lr=0.01, **settings).param_groups[0]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_law_reads_the_param_groups_of_its_optimizer(kind):
    group = group_of(kind, weight_decay=0.1)
    law = law_of_class(kind, group)
    known = law.settings_in(group)
    assert set(known) <= {*law.defaults, "adjust_lr_fn"}
    vector = Vector(coordinates=2, count=4, shape=(4, 2), unit_gradient_square=2.0)
    settled = law.equilibrium(0.01, 0.1, vector, known)
    assert 0 < settled.rotation < 0.1
    assert settled.power == 2 * settled.slope or law.bend
    without = {name: value for name, value in group.items() if name != "lr"}
    assert law_of_class(kind, without) is None


def test_each_law_has_its_names():
    assert all(LAWS[law.name] is law for law in [*CLASSES.values(), *OPTIMIZERS.values()])
    assert {law.method for law in LAWS.values()} == set(OPTIMIZERS)
    assert not set(LAWS) & {law.name for law in ON_SPHERES.values()}
    assert [law_of_class("Adam", group_of("Adam", **settings)).name for settings in (
        {}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}
    )] == ["adamw", "adam-l2", "adamw"]  # fmt: skip


def test_settings_that_a_law_does_not_cover():
    assert law_of_class("AdamW", group_of("AdamW", amsgrad=True)) is None
    assert law_of_class("SGD", group_of("SGD", momentum=0.9, dampening=0.5)) is LAWS["sgd"]
    assert law_of_class("SGDW", {**group_of("SGDW"), "dampening": 0.5}) is None
    assert law_of_class("Rprop", {}) is None


@pytest.mark.parametrize("law", ON_SPHERES.values(), ids=ON_SPHERES)
def test_an_optimizer_that_holds_norms_settles_nowhere(law):
    assert not law.has_recipe
    with pytest.raises(ValueError, match="the norm stays"):
        law.equilibrium(0.1, 0.1, Vector(), {})


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (8, 8)])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_the_factor_of_muon_is_that_of_torch(shape, adjust):
    assert muon_scale(shape, adjust) == pytest.approx(_adjust_lr(1.0, adjust, torch.Size(shape)))


@pytest.mark.parametrize("name", LAWS)
def test_norms_are_those_of_the_vector(name):
    """The weight of many entries against the laws of one, and of gradients of another size."""
    law, one = LAWS[name], LAWS[name].equilibrium(0.01, 0.1, Vector(), {})
    many = law.equilibrium(0.01, 0.1, Vector(9, 1, (), 16.0), {})
    by_entry, by_gradient = (9**0.5, 1.0) if law.norm_of == "entry" else (1.0, 16**0.25)
    if name == "adam-l2":
        by_entry, by_gradient = 9 ** (1 / 6), 16 ** (1 / 6)
    wanted = one.norm * by_entry * (by_gradient if law.depends.norm else 1)
    assert many.norm == pytest.approx(wanted, rel=1e-12)
    assert (many.rotation == one.rotation) == law.has_recipe


@pytest.mark.parametrize("name", ["sgd", "sgdw", "adam-l2", "adamw"])
def test_without_decay_it_is_the_free_growth(name):
    law, ones = LAWS[name], torch.ones(100, dtype=torch.float64)
    settings = {"momentum": 0.9} if law.degree == 2 else {}
    motion = law.growth(0.01, Vector(), settings)
    assert motion.rate == 0
    if law.degree == 2:
        wanted = dyn.free_growth(1.0, ones, 0.01, 0.9)
    else:
        wanted = dyn.adaptive_growth(1.0, 0.01 * ones)
    grown = motion.step(1.0, 100.0)[0] ** (1 / motion.power)
    assert grown == pytest.approx(float(wanted[-1]), rel=1e-6)
