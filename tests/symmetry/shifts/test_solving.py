"""Demands that say the same are made and kept once."""

from fractions import Fraction

import numpy as np
import pytest

from onsphere.symmetry.exact.shifts.tensor_shift import TensorShift
from onsphere.symmetry.exact.shifts.unknowns import Unknowns
from onsphere.symmetry.exact.units.fields import Fields
from onsphere.symmetry.shifts.rows import Rows, distinct, distinct_numbers

TOKENS = np.array([0] + [1] * 50 + [2] * 20, np.int32)[:, None] * 3 + np.arange(3, dtype=np.int32)


def of(*arrays: np.ndarray) -> Fields:
    return Fields(tuple((Fraction(1), a) for a in arrays))


def started(count: int) -> Unknowns:
    unknowns = Unknowns()
    unknowns.block("first", [count])
    return unknowns


def test_a_total_of_repeated_slices_is_made_once_for_each_run():
    unknowns = started(18)
    index = unknowns.total(of(TOKENS, TOKENS + 9))
    assert unknowns.count == 18 + 9
    assert index.shape == TOKENS.shape
    assert np.array_equal(index, 18 + TOKENS)
    assert [rows.shape for _, rows in unknowns.sums] == [(3, 9)]


def test_a_common_value_is_made_once_for_each_run():
    unknowns = started(9)
    shift = unknowns.constant(TensorShift.plain(of(TOKENS)), [-1])
    ((_, common),) = shift.fields.terms
    assert np.array_equal(common, 9 + TOKENS[:, :1] // 3)
    assert unknowns.count == 9 + 3


def test_a_bundle_of_the_same_sources_is_made_once_for_each_run():
    unknowns = started(9)
    index = unknowns.bundle(TOKENS)
    assert np.array_equal(index, 9 + TOKENS[:, 0] // 3)
    assert unknowns.count == 9 + 3


def test_rows_that_say_the_same_are_found_whatever_stands_behind_them():
    labels = np.array([[3, 5, 3], [3, 5, 5], [3, 5, 0], [3, 4, 5]])
    factors = np.array([[1.0, -1, 0], [2, -2, 0], [-1, 1, 0], [1, 0, 1]])
    assert distinct(Rows(labels, factors)).labels.tolist() == [[3, 5, 3], [3, 4, 5]]


@pytest.mark.parametrize("largest", [10, 10**6])
def test_different_numbers_are_returned_in_order(largest):
    numbers = np.random.default_rng(0).integers(5, 6 + largest, (6, 7))
    assert np.array_equal(distinct_numbers(numbers), np.unique(numbers))
