"""Unknowns that are multiples of each other are settled first, and nothing else comes out."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from onsphere.symmetry.channels.components import solved
from onsphere.symmetry.channels.multiples import Sums, multiples
from onsphere.symmetry.exact.units.channel_demands import ChannelDemands
from onsphere.symmetry.exact.units.fields import Fields
from onsphere.symmetry.exact.units.linear_forms import Constraints, Unit, in_span

COUNT = 12


def sums_of(forms: Sequence[dict[int, int]]) -> Sums:
    terms = [(row, k, c) for row, form in enumerate(forms) for k, c in form.items()]
    row, unknown, factor = np.array(terms, np.int64).reshape(-1, 3).T
    return Sums.summed(row, unknown, factor)


def random_forms(seed: int) -> list[dict[int, int]]:
    rng = np.random.default_rng(seed)
    return [
        {int(k): int(rng.choice([-3, -2, -1, 1, 2, 4])) for k in rng.choice(COUNT, size, False)}
        for size in rng.choice([1, 2, 2, 2, 3, 5], int(rng.integers(1, 12)))
    ]


@pytest.mark.parametrize("seed", range(200))
def test_classes_and_the_rest_say_what_all_demands_say(seed: int) -> None:
    forms = random_forms(seed)
    system = Constraints(COUNT)
    for form in forms:
        system.require_zero(form)
    pairs, others = sums_of(forms).pairs()
    classes = multiples(pairs, COUNT)
    assert classes is not None
    root, times = classes.root.tolist(), classes.times.tolist()
    assert all(root[r] == r <= k and times[k] for k, r in enumerate(root))
    units = Constraints(COUNT)
    for form in classes.written(others).forms():
        assert all(root[k] == k for k in form)
        units.require_zero(form)
    free = units.plain_basis()
    found = [{k: times[k] * v[r] for k, r in enumerate(root) if r in v} for v in free]
    found = [v for v in found if v]
    expected = list(system.plain_basis())
    assert len(found) == len([v for v in expected if v])
    assert all(in_span(found, expected))


def test_terms_at_one_place_are_added_up() -> None:
    sums = Sums.summed(np.array([0, 0, 1, 0]), np.array([5, 2, 1, 5]), np.array([1, 3, 2, -1]))
    assert (sums.row.tolist(), sums.unknown.tolist()) == ([0, 1], [2, 1])
    assert sums.factor.tolist() == [3, 2]


def test_rows_that_differ_by_a_factor_come_once() -> None:
    forms = [{0: 1, 1: -2, 2: 3}, {0: -2, 1: 4, 2: -6}, {3: 7}, {3: 1}]
    assert list(sums_of(forms).forms()) == [{3: 1}, {0: 1, 1: -2, 2: 3}]


def test_a_circle_that_does_not_close_vanishes() -> None:
    pairs = sums_of([{0: 1, 1: -2}, {1: 1, 2: -2}, {0: 1, 2: -1}, {3: 1, 4: 1}])
    classes = multiples(pairs, 5)
    assert classes is not None
    assert classes.nothing.tolist() == [0]
    assert classes.root.tolist() == [0, 0, 0, 3, 3]


@pytest.mark.parametrize("steps", [1, 30])
def test_numbers_too_large_for_classes_are_left_alone(steps: int) -> None:
    factor = 3**14 if steps == 1 else 2
    pairs = sums_of([{k: factor, k + 1: -1} for k in range(steps)])
    assert multiples(pairs, steps + 1) is None


@pytest.mark.parametrize("power", [1, 20])
def test_exponents_are_exact_however_small(power: int) -> None:
    channels = ChannelDemands(Constraints(2), 2)
    first, last = channels.new((3,), 0, (0,)), channels.new((3,), 1, (0,))
    small = Fraction(1, 3**power)
    channels.vanish(Unit({}, fields=Fields(((small, first), (Fraction(-1), last)))))
    (kind,) = solved(channels).kinds
    assert (kind.members - kind.members[0, 0]).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert kind.followed == {0: [(1, small)]}


def channels_of(count: int) -> tuple[ChannelDemands, list[NDArray[np.int32]]]:
    channels = ChannelDemands(Constraints(count), count)
    return channels, [channels.new((2,), k, (0,)) for k in range(count)]


def vanish(channels: ChannelDemands, *terms: tuple[int, NDArray[np.int32]]) -> None:
    channels.vanish(Unit({}, fields=Fields(tuple((Fraction(c), i) for c, i in terms))))


def test_no_demand_is_lost_where_units_are_small() -> None:
    """Sums in the smallest unit would leave the numbers of machines, and come to 0 there."""
    channels, x = channels_of(130)
    vanish(channels, (2**19, x[1]), (-1, x[0]))
    for k in x[2:]:
        vanish(channels, (1, k), (-(2**19), x[0]))
    vanish(channels, *((2**19, k) for k in x[2:]))
    (kind,) = solved(channels).kinds
    assert not kind.followed


def test_no_demand_is_lost_where_terms_repeat() -> None:
    channels, x = channels_of(3)
    some = [(2**20 - 1, x[0])] * 40
    vanish(channels, *some, (-1, x[1]))
    vanish(channels, (1, x[2]), *[(1 - 2**20, x[1])] * 40)
    (kind,) = solved(channels).kinds
    times = 40 * (2**20 - 1)
    assert kind.followed == {0: [(1, times), (2, times**2)]}


def test_what_vanishes_is_said_once() -> None:
    assert list(sums_of([{3: 1}, {3: -1}, {3: 4}]).forms()) == [{3: 1}]
