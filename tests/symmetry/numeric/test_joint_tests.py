"""Many claims put to the test at once: what is refuted, and by how many runs of the model."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry.exact.trace import trace
from onsphere.symmetry.numeric.certificate import FINITE_TOLERANCE
from onsphere.symmetry.numeric.joint_tests import largest_changes
from onsphere.symmetry.numeric.probe import Point, Probe

COUNT = 16


class _Many(nn.Module):
    """Weights whose size does not matter, but for some of them."""

    def __init__(self, matter: Sequence[int] = ()) -> None:
        super().__init__()
        self.w = nn.ParameterList(torch.randn(4) for _ in range(COUNT))
        self.matter = matter

    def forward(self, x: Tensor) -> Tensor:
        for i, w in enumerate(self.w):
            x = x + (w if i in self.matter else w / w.norm())
        return x


def _tested(model: nn.Module) -> tuple[list[float], int]:
    torch.manual_seed(0)
    x = torch.randn(4)
    probe = Probe(model, (x,), {}, trace(model, (x,)))
    runs = 0
    evaluate = probe.outputs

    def outputs(*args: object, **kwargs: object) -> list[Tensor]:
        nonlocal runs
        runs += 1
        return evaluate(*args, **kwargs)  # type: ignore[arg-type]

    probe.outputs = outputs  # type: ignore[method-assign]
    points = [probe.redrawn(0.4) for _ in range(3)]
    for point in points:
        probe.baseline(point)
    runs = 0

    def edited(_: Probe, some: Sequence[int], point: Point) -> Point:
        state = dict(point.state)
        for i in some:
            state[f"w.{i}"] = state[f"w.{i}"] * (1.3 + i)
        return replace(point, state=state)

    return largest_changes(probe, range(COUNT), edited, points), runs


def test_what_holds_takes_one_run_per_point() -> None:
    changes, runs = _tested(_Many())
    assert max(changes) <= FINITE_TOLERANCE
    assert runs == 3


@pytest.mark.parametrize("matter", [(0,), (5, 11), tuple(range(COUNT))], ids=str)
def test_what_does_not_hold_is_found_at_one_point(matter: tuple[int, ...]) -> None:
    changes, runs = _tested(_Many(matter))
    assert tuple(i for i, c in enumerate(changes) if c > FINITE_TOLERANCE) == matter
    tests = 2 + len(matter) * (2 * 4 + 1)  # halves of 16, and the points that are left
    assert runs <= 2 * tests  # and what rounding would do, where something was refuted
