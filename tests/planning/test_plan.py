import json
import math
import shlex

import pytest
import torch

import onsphere as osp
from onsphere import cli
from onsphere import dynamics as dyn
from onsphere.dynamics.optimizers import RecipeError
from onsphere.planning import PlanError, Schedule, plan, text
from onsphere.planning.codegen import command_of, recipe_code
from onsphere.planning.html import document

ADAMW = {"lr": 1e-3, "weight_decay": 0.1}
SGD = {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9}


def test_the_equilibrium_is_that_of_the_laws():
    found = plan("adamw", Schedule(10), **ADAMW, shape=(48, 12)).settled
    assert found == pytest.approx(dyn.adamw_equilibrium(lr=1e-3, weight_decay=0.1, coordinates=576))
    found = plan("sgd", Schedule(10), **SGD, unit_gradient_square=7.0).settled
    wanted = dyn.sgd_equilibrium(lr=0.1, weight_decay=5e-4, momentum=0.9, unit_gradient_square=7.0)
    assert found == pytest.approx(wanted)
    found = plan("lion", Schedule(10), lr=1e-4, weight_decay=1.0, shape=(100,)).settled
    assert found == pytest.approx(dyn.lion_equilibrium(lr=1e-4, weight_decay=1.0, coordinates=100))
    found = plan("adam", Schedule(10), **ADAMW, shape=(100,), unit_gradient_square=7.0).settled
    wanted = dyn.adam_l2_equilibrium(
        lr=1e-3, weight_decay=0.1, unit_gradient_square=7.0, coordinates=100
    )
    assert found == pytest.approx(wanted)
    found = plan("muon", Schedule(10), lr=0.02, weight_decay=0.1, shape=(256, 64)).settled
    wanted = dyn.muon_equilibrium(lr=0.02, weight_decay=0.1, shape=(256, 64), scale=2.0)
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_what_is_said_of_the_unknown_gradients_is_so(method):
    """A plan without L, times the powers it states, is the plan with it."""
    settings, shape = {"lr": 1e-3, "weight_decay": 1e-2}, (1,)
    without = plan(method, Schedule(10), **settings)
    known = plan(method, Schedule(10), **settings, shape=shape, unit_gradient_square=5.0)
    depends = without.depends
    assert known.depends == type(depends)()
    assert known.settled.norm == pytest.approx(without.settled.norm * 5.0**depends.norm)
    assert known.settled.rotation == pytest.approx(without.settled.rotation * 5.0**depends.rotation)
    assert known.half_life == pytest.approx(without.half_life * 5.0**depends.half_life)
    said = " ".join(text.notes(without))
    assert "--gradient-square" in said
    assert "--gradient-square" not in " ".join(text.notes(known))
    values = without.to_dict()["equilibrium"]
    assert values["norm"] is None
    times = values["times_powers_of_gradient_square"]["norm"]
    assert times["factor"] * 5 ** times["power"] == pytest.approx(known.settled.norm)


@pytest.mark.parametrize(("power", "verdict"), [(-1, "Too short"), (1, "Hardly"), (5, "Long en")])
def test_whether_the_run_is_long_enough(power, verdict):
    """By the half-life alone: what is left of the start is 2^(-lives)."""
    lives = 2.0**power
    lasting = round(lives * plan("adamw", Schedule(1), **ADAMW).half_life)
    planned = plan("adamw", Schedule(lasting), **ADAMW)
    assert float(planned.path.left[-1]) == pytest.approx(2**-lives, rel=1e-3)
    assert text.lifetimes(planned) == f"{lives:.1f} half-lives"
    assert text.findings(planned)[0].startswith(verdict)


def test_the_step_from_which_on_it_is_settled():
    planned = plan("sgd", Schedule(20_000), **SGD)
    at = planned.half_life * math.log2(20)
    said = text.findings(planned)[0]
    step = int(said.partition("From step ")[2].partition(" on")[0].replace(",", ""))
    assert step == pytest.approx(at, abs=12)


def test_a_start_is_told_in_units_of_the_equilibrium():
    settled = plan("sgd", Schedule(1), **SGD, unit_gradient_square=2.0).settled
    planned = plan("sgd", Schedule(99), **SGD, unit_gradient_square=2.0,
                   initial_norm=2 * settled.norm)  # fmt: skip
    assert "It starts at 2 times the norm" in " ".join(text.findings(planned))
    assert "0.25 times as fast" in " ".join(text.findings(planned))
    assert planned.around == ()


def test_drops_are_told_one_by_one():
    planned = plan("sgd", Schedule(40_000, "step", drops=(10_000, 38_000)), **SGD)
    first, second = (said for said in text.findings(planned) if said.startswith("At step"))
    assert "from 0.00725 to 0.000725 at once" in first
    assert "is back to 0.00229" in first
    assert "not back" in second
    assert "when the run ends" in second


def test_a_schedule_that_the_norm_follows():
    slow = plan("sgd", Schedule(1_000_000, "linear", final=0.5), **SGD)
    assert "The norm follows the rate" in " ".join(text.findings(slow))
    fast = plan("sgd", Schedule(1000, "linear"), **SGD)
    assert "falls faster than the norm" in " ".join(text.findings(fast))


def test_without_decay():
    free = plan("sgd", Schedule(1000), lr=0.1, weight_decay=0.0)
    assert free.settled is free.recipe is free.half_life is None
    assert "t^(1/4)" in text.findings(free)[0]
    assert recipe_code(free) == []
    given = plan("adam", Schedule(10_000), lr=0.1, weight_decay=0.0, initial_norm=2.0)
    assert "t^(1/2)" in text.findings(given)[0]
    end = float(given.path.norm[-1])
    assert f"from 2 to {end:.3g}" in text.findings(given)[1]


def test_a_memory_longer_than_the_half_life_is_minded():
    quick = plan("adamw", Schedule(1000), lr=0.1, weight_decay=0.1)
    assert "remembers some 1,000 gradients" in " ".join(text.notes(quick))
    assert "remembers" not in " ".join(text.notes(plan("adamw", Schedule(1000), **ADAMW)))


PLANS = {
    "adamw": ("adamw", {"betas": (0.9, 0.95), **ADAMW}, Schedule(50, "cosine", warmup=5)),
    "sgd": ("sgd", {**SGD, "nesterov": True}, Schedule(50, "step", drops=(20,))),
    "lion": ("lion", ADAMW, Schedule(50, "wsd", cooldown=0.4)),
    "muon": ("muon", {**ADAMW, "shape": (8, 8)}, Schedule(50, "linear", final=0.1)),
    "constant": ("adamw", ADAMW, Schedule(50)),
}


@pytest.mark.parametrize(("method", "settings", "schedule"), PLANS.values(), ids=PLANS)
def test_the_lines_of_code_turn_the_weights_as_planned(method, settings, schedule, generator):
    planned = plan(method, schedule, **settings)
    layers = [torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)]
    model = torch.nn.Sequential(*layers)
    model[0].bias = None
    audit = osp.audit(model, torch.randn(4, 8, generator=generator))
    scope = {"osp": osp, "torch": torch, "model": model, "audit": audit}
    exec("\n".join(recipe_code(planned)), scope)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.randn(8, 8, generator=generator)
    scope["optimizer"].step()
    turned = torch.cosine_similarity(
        before.flatten().double(), model[0].weight.detach().flatten().double(), dim=0
    ).acos()
    wanted = planned.recipe.rotation * schedule(0) ** 0.5
    assert float(turned) == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize(("method", "settings", "schedule"), PLANS.values(), ids=PLANS)
def test_the_command_makes_the_same_plan(method, settings, schedule, capsys):
    planned = plan(method, schedule, **settings, batch_size=32)
    program, *arguments = shlex.split(command_of(planned))
    assert program == "onsphere"
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = json.loads(json.dumps(planned.to_dict()))
    assert {key: found[key] for key in wanted} == wanted


def test_the_page_says_it_all():
    shown = document(plan("sgd", Schedule(5000, "cosine"), **SGD, batch_size=64))
    assert [section.name for section in shown.sections] == ["equilibrium", "run", "sphere"]
    (figure,) = shown.sections[1].figures
    rotation, norm, rate = figure.panels
    assert rotation.series[1].dashed
    assert rotation.series[0].low is not None
    assert "L = 1" in norm.y_label
    assert max(rate.series[0].y) == 1
    unknown = document(plan("adam", Schedule(5000), **ADAMW))
    assert [section.name for section in unknown.sections] == ["equilibrium"]
    assert "L^(-1/6)" in unknown.sections[0].tables[0].rows[0][1]


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("adamw", {"lr": -1.0}, "lr is a positive number"),
        ("adamw", {"lr": 0.0}, "nothing moves"),
        ("adamw", {"lr": math.nan}, "lr is a positive number"),
        ("adamw", {"weight_decay": -0.1}, "weight_decay is a positive number"),
        ("adamw", {"lr": 1.0, "weight_decay": 1.0}, "takes the whole weight"),
        ("adam", {"lr": 2.0, "weight_decay": 1.0}, "takes the whole weight"),
        ("adamw", {"momentum": 0.9}, "adamw has no momentum; it takes betas"),
        ("adamw", {"weight_decay": 0.0, "momentum": 0.9}, "adamw has no momentum"),
        ("adam", {"betas": (0.9, 1.0)}, "betas are two numbers"),
        ("adamm", {}, "did you mean 'adam'?"),
        ("sgd", {"nesterov": True}, "nesterov needs momentum"),
        ("muon", {"shape": (3, 3, 3)}, "two sides"),
        ("adamw", {"shape": (3, 0)}, "sides of at least 1"),
        ("adamw", {"unit_gradient_square": 2.0}, "nothing under adamw depends"),
        ("sgd", {"unit_gradient_square": 0.0}, "gradient square is above 0"),
        ("sgd", {"initial_norm": 1.0}, "give the gradient square as well"),
        ("adamw", {"initial_norm": math.inf}, "initial norm is above 0"),
        ("adam", {"unit_gradient_square": 1.0}, "give the shape"),
        ("adamw", {"batch_size": 0}, "at least 1 example"),
    ],
)
def test_what_cannot_be(method, settings, says):
    with pytest.raises((PlanError, RecipeError), match=says.replace("?", r"\?")) as caught:
        plan(method, Schedule(10), **{**ADAMW, **settings})
    assert "\n" not in str(caught.value)
