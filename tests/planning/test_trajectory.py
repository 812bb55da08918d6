"""The path under a schedule: random walks under real optimizers, and closed forms."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Muon

from onsphere import dynamics as dyn
from onsphere.dynamics import SGDW, Lion, random_walk
from onsphere.dynamics import trajectory as motions
from onsphere.dynamics.autocorrelation import Memory, arcsine
from onsphere.dynamics.trajectory import follow
from onsphere.planning import PlanError, Schedule, plan

LEVEL, WIDTH = 4.0, 64

# method, optimizer, settings of both, of the plan alone
RUNS = {
    "SGD": ("sgd", SGD, {"lr": 0.1, "weight_decay": 0.05}, {}),
    "SGD, momentum": ("sgd", SGD, {"lr": 0.004, "weight_decay": 0.05, "momentum": 0.9}, {}),
    "SGD, decoupled": (
        *("sgd", SGDW, {"lr": 0.05, "weight_decay": 0.05, "momentum": 0.8}),
        {"decoupled": True},
    ),
    "AdamW": ("adamw", AdamW, {"lr": 0.05, "weight_decay": 0.1, "betas": (0.9, 0.95)}, {}),
    "Adam + L2": ("adam", Adam, {"lr": 0.02, "weight_decay": 0.01, "betas": (0.8, 0.95)}, {}),
    "Lion": ("lion", Lion, {"lr": 0.01, "weight_decay": 0.3, "betas": (0.9, 0.95)}, {}),
}


def planned(name: str, schedule: Schedule, **given):
    method, _, settings, more = RUNS[name]
    if method in ("sgd", "adam"):
        given["unit_gradient_square"] = LEVEL
    return plan(method, schedule, shape=(WIDTH,), **settings, **more, **given)


def walked(
    name: str, schedule: Schedule, initial_norm: float, generator
) -> dict[str, torch.Tensor]:
    """Root mean squares over vectors, smoothed over five steps."""
    _, kind, settings, _ = RUNS[name]
    make = partial(kind, **settings, **({"eps": 1e-30} if kind in (Adam, AdamW) else {}))
    lrs = settings["lr"] * schedule.factors(torch.arange(schedule.steps).double())
    walk = random_walk(
        make, steps=schedule.steps, shape=(WIDTH,), vectors=48, initial_norm=initial_norm,
        unit_gradient_square=LEVEL, lrs=lrs, generator=generator,
    )  # fmt: skip
    return {key: walk[key].square().mean(1).sqrt() for key in ("norm", "rotation")}


def differences(path, walk, times: slice) -> dict[str, float]:
    """Return how far the path is off, at worst, among windows of five steps."""
    found = {}
    for key, expected in (("norm", path.norm), ("rotation", path.rotation)):
        windows = [series[times].unfold(0, 5, 5).mean(1) for series in (walk[key], expected)]
        found[key] = float((windows[0] / windows[1] - 1).abs().max())
    return found


QUICK = ("SGD", "AdamW")
MARKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


@pytest.mark.parametrize("name", MARKED)
def test_a_cosine_is_followed(name, generator):
    schedule = Schedule(400, "cosine", warmup=20)
    expected = planned(name, schedule)
    walk = walked(name, schedule, expected.settled.norm, generator)
    off = differences(expected.path, walk, slice(40, 380))
    assert off["norm"] < (0.05 if name == "Lion" else 0.03)  # its average has to fill first
    assert off["rotation"] < 0.05
    # Late in the run the balance of the present rate is another thing, by far.
    assert float(expected.path.rotation[370] / expected.path.balance[370]) < 0.5


@pytest.mark.parametrize(
    ("name", "away"), [("AdamW", 0.5), pytest.param("SGD", 2.0, marks=pytest.mark.slow)]
)
def test_a_start_away_from_the_balance_is_forgotten(name, away, generator):
    schedule, start = Schedule(400), away * planned(name, Schedule(1)).settled.norm
    expected = planned(name, schedule, initial_norm=start)
    walk = walked(name, schedule, start, generator)
    # Adam's second moment starts with the gradients of the short weight, and forgets them.
    times = slice(100 if name == "AdamW" else 30, 400)
    assert differences(expected.path, walk, times)["norm"] < 0.04
    assert abs(float(expected.path.norm[times.start] / expected.settled.norm) - 1) > 0.1
    assert float(expected.path.rotation[0] / expected.settled.rotation) == pytest.approx(
        away**-expected.motion.slope, rel=1e-9
    )
    assert float(expected.path.rotation[-1]) == pytest.approx(expected.settled.rotation, rel=0.05)


@pytest.mark.parametrize("name", ["SGD", pytest.param("AdamW", marks=pytest.mark.slow)])
def test_a_drop_by_k_turns_k_times_slower_and_comes_back_to_its_root(name, generator):
    schedule = Schedule(400, "step", drops=(100,), drop_by=9.0)
    expected = planned(name, schedule)
    path, settled = expected.path, expected.settled.rotation
    assert float(path.rotation[99]) == pytest.approx(settled, rel=1e-9)
    assert float(path.rotation[100]) == pytest.approx(settled / 9, rel=1e-9)
    assert path.balance[100:].tolist() == pytest.approx([settled / 3] * 300, rel=1e-9)
    walk = walked(name, schedule, expected.settled.norm, generator)
    assert differences(path, walk, slice(130, 400))["rotation"] < 0.06
    long = planned(name, Schedule(30_000, "step", drops=(100,), drop_by=9.0)).path
    assert float(long.rotation[-1]) == pytest.approx(settled / 3, rel=1e-4)


def test_a_wrong_law_would_be_seen(generator):
    schedule = Schedule(300, "cosine")
    right = planned("AdamW", schedule)
    wrong = planned("SGD", schedule)  # relaxes as the fourth power, and twice as fast
    walk = walked("AdamW", schedule, right.settled.norm, generator)
    scaled = follow(moved(wrong, right), schedule, right.settled.norm)
    assert differences(scaled, walk, slice(40, 280))["rotation"] > 0.1


def moved(wrong, right):
    """Return the motion of one law in the place of the other."""
    return motions.Motion.of(
        wrong.settled._replace(norm=right.settled.norm, rotation=right.settled.rotation)
    )


def test_without_decay_it_is_the_growth_of_the_laws():
    steps = 1500
    ones = torch.ones(steps, dtype=torch.float64)
    sgd = plan("sgd", Schedule(steps), lr=0.1, weight_decay=0.0, momentum=0.9,
               unit_gradient_square=LEVEL, initial_norm=1.5)  # fmt: skip
    wanted = dyn.free_growth(1.5, LEVEL * ones, 0.1, 0.9)[:-1]
    torch.testing.assert_close(sgd.path.norm, wanted, rtol=1e-6, atol=0)
    adam = plan("adam", Schedule(steps), lr=0.1, weight_decay=0.0, shape=(64,), initial_norm=1.5)
    wanted = dyn.adaptive_growth(1.5, 0.1 * ones, 64)[:-1]
    torch.testing.assert_close(adam.path.norm, wanted, rtol=1e-6, atol=0)
    lion = plan("lion", Schedule(steps), lr=0.1, weight_decay=0.0, shape=(64,), initial_norm=1.5)
    memory = {"memory": Memory(0.9, 0.99), "response": arcsine}
    wanted = dyn.adaptive_growth(1.5, 0.1 * ones, 64, **memory)[:-1]
    torch.testing.assert_close(lion.path.norm, wanted, rtol=1e-6, atol=0)
    assert sgd.settled is adam.settled is lion.settled is None
    assert sgd.path.balance.isnan().all()


@pytest.mark.parametrize(("name", "start"), [("SGD", 2.0), ("SGD, momentum", 2.0), ("AdamW", 20.0)])
def test_without_decay_a_walk_grows_and_turns_so(name, start, generator):
    method, kind, settings, _ = RUNS[name]
    free = {**settings, "weight_decay": 0.0}
    level = {"unit_gradient_square": LEVEL} if method == "sgd" else {}
    expected = plan(method, Schedule(300), shape=(WIDTH,), initial_norm=start, **free, **level)
    walk = random_walk(
        partial(kind, **free), steps=300, shape=(WIDTH,), vectors=48, initial_norm=start,
        unit_gradient_square=LEVEL, generator=generator,
    )  # fmt: skip
    walk = {key: walk[key].square().mean(1).sqrt() for key in ("norm", "rotation")}
    off = differences(expected.path, walk, slice(40, 300))
    assert off["norm"] < 0.02
    assert off["rotation"] < 0.06
    assert float(expected.path.norm[-1]) > 1.04 * start


@pytest.mark.parametrize(("method", "first"), [("sgd", 0.0), ("adam", 0.9)])
def test_an_outgrown_start_leaves_only_the_clock(method, first):
    """Rotation after t steps is sqrt((1 - b)/((1 + b) p/2 t)), whatever rate and gradients are."""
    for lr in (0.1, 0.003):
        grown = plan(method, Schedule(1000), lr=lr, weight_decay=0.0)
        time = grown.path.steps[1:].double()
        wanted = ((1 - first) / (1 + first) / (grown.motion.power / 2 * time)).sqrt()
        torch.testing.assert_close(grown.path.rotation[1:], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(30_000, "cosine", warmup=50),
        Schedule(30_000, "linear", final=0.1),
        Schedule(30_000, "wsd", warmup=300),
        Schedule(30_000, "step", drops=(7_001, 20_003)),
    ],
    ids=lambda s: s.kind,
)
@pytest.mark.parametrize("name", ["SGD, momentum", "Adam + L2"])
def test_long_runs_in_pieces_are_those_in_steps(name, schedule, monkeypatch):
    start = 3 * planned(name, Schedule(1)).settled.norm
    quick = planned(name, schedule, initial_norm=start).path
    monkeypatch.setattr(motions, "POINTS", schedule.steps + 1)
    exact = planned(name, schedule, initial_norm=start).path
    assert len(quick.steps) < 4000 < len(exact.steps)
    same = exact.rotation[quick.steps]
    assert float((quick.rotation / same - 1).abs().nan_to_num(0).max()) < 0.02
    torch.testing.assert_close(quick.norm, exact.norm[quick.steps], rtol=0.01, atol=0)


@pytest.mark.slow
def test_muon_is_that_of_torch(generator):
    """The norm comes out short by torch's own iterations, which end near 0.87 (see the notes)."""
    schedule = Schedule(300, "cosine")
    expected = plan("muon", schedule, lr=0.02, weight_decay=0.5, shape=(96, 16))
    lrs = 0.02 * schedule.factors(torch.arange(300).double())
    walk = random_walk(
        partial(Muon, lr=0.02, weight_decay=0.5), steps=300, shape=(96, 16), vectors=2,
        initial_norm=0.87 * expected.settled.norm, lrs=lrs, generator=generator,
    )  # fmt: skip
    walk = {key: walk[key].square().mean(1).sqrt() for key in ("norm", "rotation")}
    ratios = (walk["norm"] / expected.path.norm)[100:]
    assert 0.8 < float(ratios.min()) < float(ratios.max()) < 0.95
    assert differences(expected.path, walk, slice(100, 280))["rotation"] < 0.1


def test_numbers_beyond_what_can_be_computed():
    with pytest.raises(PlanError, match="too large or too small"):
        plan("sgd", Schedule(9), lr=0.1, weight_decay=0.1, unit_gradient_square=1.0,
             initial_norm=1e200)  # fmt: skip
