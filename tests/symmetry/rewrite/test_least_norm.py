"""The least norm against a dense minimizer, and what happens where there is none."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onsphere.symmetry.rewrite.balancing.least_norm import annihilated, least_norm, stepping

ONE = Fraction(1)


def trade(*names: str) -> dict[str, Fraction]:
    """The first name against all the others."""
    return {n: ONE if i == 0 else -ONE for i, n in enumerate(names)}


def sphere(*names: str) -> dict[str, Fraction]:
    return dict.fromkeys(names, ONE)


def total(squares: dict[str, float], scales: dict[str, float]) -> float:
    return sum(w * 4 ** scales.get(n, 0.0) for n, w in squares.items())


def moved(squares: dict[str, float], scales: dict[str, float]) -> dict[str, float]:
    return {n: w * 4 ** scales.get(n, 0.0) for n, w in squares.items()}


# name, symmetries, squared norms, squared norms afterwards
CASES = (
    ("a pair", [trade("a", "b")], {"a": 16.0, "b": 1.0}, {"a": 4.0, "b": 4.0}),
    ("far apart", [trade("a", "b")], {"a": 1e30, "b": 1e-30}, {"a": 1.0, "b": 1.0}),
    ("a chain", [trade("a", "b"), trade("b", "c")], {"a": 64.0, "b": 1.0, "c": 1.0},
     {"a": 4.0, "b": 4.0, "c": 4.0}),
    ("one against two", [trade("a", "b", "c")], {"a": 8.0, "b": 1.0, "c": 1.0},
     {"a": 4.0, "b": 2.0, "c": 2.0}),
    ("against zero", [trade("a", "zero")], {"a": 9.0, "zero": 0.0}, {"a": 9.0, "zero": 0.0}),
    ("a sphere", [sphere("a")], {"a": 9.0}, {"a": 9.0}),
    ("a joint sphere", [sphere("a", "b")], {"a": 9.0, "b": 1.0}, {"a": 9.0, "b": 1.0}),
    ("spheres that trade", [sphere("a"), trade("a", "b")], {"a": 16.0, "b": 1.0},
     {"a": 16.0, "b": 1.0}),
    ("a falling pair and a zero", [trade("zero", "a", "b"), trade("a", "b")],
     {"a": 16.0, "b": 1.0, "zero": 0.0}, {"a": 4.0, "b": 4.0, "zero": 0.0}),
    ("nothing", [], {"a": 4.0}, {"a": 4.0}),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "symmetries", "before", "after"), CASES, ids=[c[0] for c in CASES]
)
def test_known_minima(name: str, symmetries: list, before: dict, after: dict) -> None:
    found = moved(before, least_norm(symmetries, before))
    assert found == pytest.approx(after, rel=1e-9)


def test_two_independent_spheres_keep_their_lengths_each() -> None:
    assert least_norm([sphere("a"), sphere("b")], {"a": 4.0, "b": 9.0}) == {}


def test_fixed_names_stay() -> None:
    chain = [trade("a", "b"), trade("b", "c")]
    found = least_norm(chain, {"a": 64.0, "b": 1.0, "c": 16.0}, fixed={"a"})
    assert found == pytest.approx({"b": 1.0, "c": -1.0})


SYSTEMS = st.lists(
    st.dictionaries(st.sampled_from("abcde"), st.sampled_from([-2, -1, 1, 2]), min_size=2),
    min_size=1,
    max_size=3,
)
NORMS = st.fixed_dictionaries({n: st.floats(1e-3, 1e3) for n in "abcde"})


def fractions(systems: list[dict[str, int]]) -> list[dict[str, Fraction]]:
    return [{n: Fraction(e) for n, e in v.items()} for v in systems]


def gradient(symmetries: list, squares: dict[str, float]) -> list[float]:
    """Pull along each symmetry, relative to the norms that it moves."""
    return [
        sum(float(e) * squares[n] for n, e in v.items())
        / sum(abs(float(e)) * squares[n] for n, e in v.items())
        for v in symmetries
    ]


@given(SYSTEMS, NORMS)
def test_the_norm_never_grows_and_twice_is_once(systems: list, squares: dict) -> None:
    symmetries = fractions(systems)
    scales = least_norm(symmetries, squares)
    assert total(squares, scales) <= total(squares, {}) * (1 + 1e-12)
    assert least_norm(symmetries, moved(squares, scales)) == {}


@given(SYSTEMS, NORMS, st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_the_minimum_is_the_same_from_anywhere_on_the_orbit(
    systems: list, squares: dict, steps: list[float]
) -> None:
    symmetries = [v for v in fractions(systems) if min(v.values()) < 0 < max(v.values())]
    start = dict.fromkeys(squares, 0.0)
    for v, t in zip(symmetries, steps, strict=False):
        for n, e in v.items():
            start[n] += t * float(e)
    other = moved(squares, start)
    one = moved(squares, least_norm(symmetries, squares))
    two = moved(other, least_norm(symmetries, other))
    if max(map(abs, gradient(symmetries, one)), default=0.0) < 1e-6:  # a minimum exists
        assert two == pytest.approx(one, rel=1e-6)


@given(SYSTEMS, NORMS)
def test_powers_of_two_never_grow_stay_put_and_are_whole(systems: list, squares: dict) -> None:
    symmetries = fractions(systems)
    whole = [{n: ONE} for n in squares]
    scales = least_norm(symmetries, squares, octaves=whole)
    assert all(u == round(u) for u in scales.values())
    assert total(squares, scales) <= total(squares, {})
    assert least_norm(symmetries, moved(squares, scales), octaves=whole) == {}


@pytest.mark.parametrize("seed", range(10))
def test_powers_of_two_reach_the_least_norm_of_all_small_ones(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = (3 * torch.randn(4, generator=generator, dtype=torch.float64)).exp()
    squares = dict(zip("abcd", draw.tolist(), strict=True))
    symmetries = [trade("a", "b"), trade("b", "c", "d"), trade("c", "d")]
    scales = least_norm(symmetries, squares, octaves=[{n: ONE} for n in squares])
    reached = []
    for k in product(range(-12, 13), repeat=3):
        u = dict.fromkeys(squares, 0.0)
        for v, steps in zip(symmetries, k, strict=True):
            for n, e in v.items():
                u[n] += steps * float(e)
        reached.append(total(squares, u))
    assert total(squares, scales) == pytest.approx(min(reached), rel=1e-9)


def test_some_scales_whole_and_others_free() -> None:
    chain = [trade("a", "b"), trade("c", "d"), trade("b", "c")]
    squares = {"a": 50.0, "b": 1.0, "c": 3.0, "d": 0.1}
    scales = least_norm(chain, squares, octaves=[{"a": ONE}])
    assert scales["a"] == round(scales["a"])
    after = moved(squares, scales)
    assert after["b"] == pytest.approx(after["c"]) == pytest.approx(after["d"])
    assert least_norm(chain, after, octaves=[{"a": ONE}]) == {}


def test_a_step_moves_every_form_by_whole_numbers_and_no_further_than_needed() -> None:
    basis = [{0: ONE, 1: -ONE}, {1: ONE, 2: ONE}]
    forms = [{0: Fraction(3, 2)}, {1: Fraction(1, 2)}]
    found = stepping(basis, forms)
    assert found.free == ()
    images = [
        [sum(c * v.get(k, 0) for k, c in form.items()) for form in forms] for v in found.stepped
    ]
    assert images == [[3, -1], [0, 1]]


def test_annihilated_is_the_part_that_forms_do_not_see() -> None:
    basis = [{0: ONE, 1: -ONE}, {1: ONE, 2: -ONE}]
    assert annihilated(basis, [{1: ONE}]) == [{0: ONE, 2: -ONE}]
