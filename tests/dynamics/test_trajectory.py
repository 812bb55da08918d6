"""One step of the recursion of norms against closed forms; runs of it are in tests/planning."""

import pytest
import torch

from onsphere.dynamics import adam_l2_equilibrium, adamw_equilibrium, relaxation, sgd_equilibrium
from onsphere.dynamics.relaxation import mean_rotation, rotation_at
from onsphere.dynamics.trajectory import Motion

LAWS = {
    "SGD": sgd_equilibrium(lr=0.1, weight_decay=0.02, momentum=0.9, unit_gradient_square=3.0),
    "AdamW": adamw_equilibrium(lr=0.05, weight_decay=0.1, coordinates=7),
}
ADAM_L2 = adam_l2_equilibrium(lr=0.01, weight_decay=0.1, unit_gradient_square=2.0)


def walked(motion: Motion, start: float, steps: list[float]) -> float:
    power = start**motion.power
    for length in steps:
        power, _ = motion.step(power, length)
    return power ** (1 / motion.power)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("away", [0.3, 1.0, 4.0])
def test_many_steps_are_the_closed_form(law, away):
    start, wanted = away * law.norm, relaxation(away * law.norm, law, torch.tensor(40.0).double())
    for steps in ([1.0] * 40, [40.0], [2.5] * 16):
        assert walked(Motion.of(law), start, steps) == pytest.approx(float(wanted), rel=1e-12)


def test_what_is_left_is_the_part_of_the_start():
    motion = Motion.of(LAWS["AdamW"])
    low, high = (motion.step(power, 30.0) for power in (1.0, 2.0))
    assert low[1] == high[1] == pytest.approx(high[0] - low[0], rel=1e-12)


@pytest.mark.parametrize("law", [*LAWS.values(), ADAM_L2], ids=[*LAWS, "Adam + L2"])
def test_it_rests_at_the_equilibrium(law):
    motion = Motion.of(law, bend=int(law is ADAM_L2))
    assert walked(motion, 1.5 * law.norm, [1.0] * 40_000) == pytest.approx(law.norm, rel=1e-9)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("away", [0.3, 1.0, 4.0])
def test_the_mean_rotation_is_the_mean_over_the_way(law, away):
    times = torch.linspace(0, 200, 200_001, dtype=torch.float64)
    turned = rotation_at(relaxation(away * law.norm, law, times), law)
    mean = float(torch.trapezoid(turned, times) / 200)
    assert mean_rotation(away * law.norm, law, 200) == pytest.approx(mean, rel=1e-6)


def test_the_mean_rotation_of_adam_with_l2_is_not_known():
    with pytest.raises(ValueError, match="slope is half the power"):
        mean_rotation(1.0, ADAM_L2, 10)
