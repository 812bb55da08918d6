"""Rows and slices that repeat are found, also where only a few columns tell."""

import numpy as np
import pytest

from onsphere.symmetry.exact.units.repeats import alike, first_alike, without_repeats


@pytest.mark.parametrize("width", [1, 7, 64, 65, 300])
@pytest.mark.parametrize("seed", range(6))
def test_kinds_come_in_the_order_of_their_first_rows(width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    some = np.repeat(rng.integers(-1, 3, (1, width)), 9, 0).astype(np.int32)
    some[np.arange(9), rng.integers(width, size=9)] += rng.integers(0, 2, 9)  # one column tells
    first, kind = alike(some)
    expected: dict[bytes, int] = {}
    assert kind.tolist() == [expected.setdefault(row.tobytes(), len(expected)) for row in some]
    assert first.tolist() == [kind.tolist().index(k) for k in range(len(expected))]


def test_slices_are_left_out_where_all_arrays_repeat() -> None:
    rows = np.array([[0], [1], [0], [0]], np.int32)
    flags = np.array([[0, 0], [1, 1], [0, 0], [0, 1]], bool)
    columns = np.array([[5, 6]], np.int32)
    found = without_repeats([rows, flags, columns], 0)
    assert [a.tolist() for a in found] == [
        [[0], [1], [0]], [[False, False], [True, True], [False, True]], [[5, 6]],
    ]  # fmt: skip
    assert [a.shape for a in without_repeats(found, 1)] == [(3, 1), (3, 2), (1, 2)]
    same = without_repeats([rows, np.array([[7, 7]], np.int32)], 1)
    assert [a.shape for a in same] == [(4, 1), (1, 1)]


@pytest.mark.parametrize("axis", [-1, -2, -3])
@pytest.mark.parametrize("seed", range(8))
def test_vectors_along_an_axis_are_numbered(axis: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (3, 4, 2)
    arrays = [
        rng.integers(0, 2, [n if rng.random() < 0.6 else 1 for n in shape[rng.integers(3) :]])
        for _ in range(3)
    ]
    arrays.append(np.arange(24).reshape(shape) // (24 if seed < 6 else 5))
    found = first_alike([a.astype(np.int32) for a in arrays], axis)
    whole = np.stack([np.broadcast_to(a, shape) for a in arrays], -1)
    vectors = np.moveaxis(whole, axis - 1, -2).reshape(-1, shape[axis] * len(arrays))
    expected: dict[bytes, int] = {}
    assert found.tolist() == [expected.setdefault(v.tobytes(), len(expected)) for v in vectors]
