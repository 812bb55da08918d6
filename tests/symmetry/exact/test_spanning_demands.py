"""Of a sum that vanishes along several axes, entries that say it of all others."""

import numpy as np
import pytest
from numpy.typing import NDArray

from onsphere.symmetry.exact.units.fields import compressed
from onsphere.symmetry.exact.units.spanning import spanning, unmerged


def rows_of(terms: list[NDArray[np.int32]], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """One row per entry of the sum: how often each unknown is in it, and a constant."""
    numbers = np.stack([np.broadcast_to(t, shape).ravel() for t in terms])
    unknowns = np.unique(numbers)
    rows = np.zeros((numbers.shape[1], len(unknowns) + 1))
    rows[:, -1] = 1
    for k, entries in enumerate(numbers):
        rows[np.arange(len(rows)), np.searchsorted(unknowns, entries)] += k + 1
    return rows


@pytest.mark.parametrize("seed", range(6))
def test_no_entry_says_more(seed: int) -> None:
    random = np.random.default_rng(seed)
    fewer = 0
    for _ in range(60):
        shape = tuple(random.integers(1, 5, random.integers(2, 5)))
        terms = []
        for k in range(random.integers(1, 5)):
            sizes = [n if random.random() < 0.5 else 1 for n in shape]
            term = np.arange(np.prod(sizes), dtype=np.int32).reshape(sizes)
            if random.random() < 0.5:
                term = random.integers(0, 3, sizes, dtype=np.int32)
            if random.random() < 0.4:
                term[1:] = term[-1:]  # a class token before patches that are alike
            terms.append(compressed(term + np.int32(100 * k)))
        kept = spanning(terms, shape).ravel()
        rows = rows_of(terms, shape)
        assert np.linalg.matrix_rank(rows[kept]) == np.linalg.matrix_rank(rows)
        fewer += not kept.all()
    assert fewer > 20


def test_positions_added_to_patches_behind_a_class_token() -> None:
    token = np.arange(5, dtype=np.int32) + np.where(np.arange(9)[:, None] > 0, 5, 0)
    kept = spanning(
        [token.astype(np.int32), np.arange(9, dtype=np.int32)[:, None], np.arange(5)[None]], (9, 5)
    )
    assert kept.sum() == 2 * 5 + 7


def test_axes_that_a_view_merged_are_split_again() -> None:
    rows, middle, columns = np.indices((3, 4, 5), np.int32).reshape(3, 60)
    queries = np.arange(2, dtype=np.int32)[:, None]
    split = unmerged([queries + 10 * rows, middle, columns, queries])
    assert [a.shape for a in split] == [(2, 3, 1, 1), (1, 1, 4, 1), (1, 1, 1, 5), (2, 1, 1, 1)]
    for a, b in zip(split, (queries + 10 * rows, middle, columns, queries), strict=True):
        whole = np.broadcast_to(a, (2, 3, 4, 5)).reshape(2, 60)
        assert (whole == b).all()


@pytest.mark.parametrize(
    "others",
    [
        np.arange(12, dtype=np.int32),  # varies along both parts
        np.arange(12, dtype=np.int32) // 6,  # in longer runs
        np.arange(12, dtype=np.int32) % 6,
    ],
)
def test_other_axes_stay(others: NDArray[np.int32]) -> None:
    rows = np.arange(12, dtype=np.int32) // 4
    assert [a.shape for a in unmerged([rows, others])] == [(12,), (12,)]
