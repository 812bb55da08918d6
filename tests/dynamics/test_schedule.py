import math

import pytest
import torch

from onsphere.planning import PlanError, Schedule

TIMES = torch.arange(100).double()


def series(schedule: Schedule) -> list[float]:
    return schedule.factors(TIMES).tolist()


def test_each_kind_by_its_formula():
    rest = [(t - 20) / 80 for t in range(20, 100)]
    assert series(Schedule(100)) == [1.0] * 100
    warm = [(t + 1) / 20 for t in range(20)]
    cosine = series(Schedule(100, "cosine", warmup=20, final=0.1))
    assert cosine[:20] == pytest.approx(warm)
    assert cosine[20:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * s)) / 2 for s in rest])
    linear = series(Schedule(100, "linear", warmup=20, final=0.5))
    assert linear[20:] == pytest.approx([1 - s / 2 for s in rest])
    wsd = series(Schedule(100, "wsd", warmup=20, cooldown=0.5))
    assert wsd[20:51] == [1.0] * 31
    assert wsd[50:] == pytest.approx([1 - t / 50 for t in range(50)])
    step = series(Schedule(100, "step", drops=(60, 30), drop_by=4.0))
    assert step == [1.0] * 30 + [0.25] * 30 + [0.0625] * 40


@pytest.mark.parametrize("warmup", [0, 10])
def test_cosine_and_linear_are_those_of_pytorch(warmup):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90, eta_min=0.2)
    if warmup:
        ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 9)
        theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, theirs], [10])
    ours = Schedule(90 + warmup, "cosine", warmup=warmup, final=0.2)
    for step in range(90 + warmup):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_a_cooldown_longer_than_the_rest_starts_after_the_warmup():
    wsd = Schedule(100, "wsd", warmup=60, cooldown=0.8)
    assert series(wsd)[60:] == pytest.approx([1 - t / 40 for t in range(40)])
    assert wsd.corners == (0, 60)


def test_a_call_goes_on_after_the_end():
    schedule = Schedule(10, "linear", final=0.5)
    assert [schedule(t) for t in (0, 5, 10, 99)] == [1.0, 0.75, 0.5, 0.5]
    assert Schedule(1)(0) == 1.0


def test_it_says_itself():
    assert str(Schedule(1000, "cosine", warmup=10)) == (
        "1,000 steps, 10 steps of warmup, then cosine to 0"
    )
    assert str(Schedule(9, "step", drops=(3, 6), drop_by=2.0)) == "9 steps, divided by 2 at 3, 6"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "at least 1 step, got 0"),
        ({"kind": "cosin"}, "did you mean 'cosine'?"),
        ({"warmup": 10}, "less than the 10 of the run, got 10"),
        ({"warmup": -1}, "at least 0 steps"),
        ({"kind": "linear", "final": 1.5}, "from 0 to 1, got 1.5"),
        ({"kind": "linear", "final": math.nan}, "from 0 to 1, got nan"),
        ({"final": 0.5}, "constant schedule has no final factor"),
        ({"kind": "wsd", "cooldown": 0.0}, "above 0 and at most 1"),
        ({"kind": "step"}, "needs the steps"),
        ({"drops": (3,)}, "constant schedule has no drops"),
        ({"kind": "step", "drops": (3, 10)}, "from 1 to 9"),
        ({"kind": "step", "drops": (3,), "drop_by": 1.0}, "above 1, got 1.0"),
        ({"kind": "step", "drops": (3,), "drop_by": math.inf}, "above 1, got inf"),
    ],
)
def test_what_cannot_be(settings, says):
    with pytest.raises(PlanError, match=says) as caught:
        Schedule(**{"steps": 10, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cooldown": 0.3}, "no cooldown; wsd has"),
        ({"drop_by": 3.0}, "step has"),
        ({"steps": 10**23}, "at most"),
    ],
)
def test_what_a_schedule_does_not_take(options, says):
    with pytest.raises(PlanError, match=says):
        Schedule(**{"steps": 100, "kind": "cosine", **options})
