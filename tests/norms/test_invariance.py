"""The measured table against the theory, the negative controls included."""

import pytest
import torch

from onsphere.norms import METHODS, invariance_table
from onsphere.norms.invariance import measure

# Theory: finest scale group of the weight, the same with the bias, invariance to the data's scale,
# degree, shifts that change nothing.
THEORY = {
    "bn": ("filter", "filter", True, 0.0, {"bias"}),
    "ln": ("none", "layer", True, 0.0, {"layer rows"}),
    "in": ("filter", "filter", True, 0.0, {"bias"}),
    "gn": ("none", "group", True, 0.0, {"layer rows", "group rows"}),
    "rms": ("none", "layer", True, 0.0, set()),
    "wn": ("filter", "none", False, 0.0, set()),
    "cwn": ("filter", "none", False, 0.0, {"row entries"}),
    "ws": ("filter", "none", False, 0.0, {"row entries"}),
    "sn": ("layer", "none", False, 0.0, set()),
    "softmax head": ("none", "none", False, None, {"layer rows"}),
    "RobustNorm": ("none", "none", False, 0.8, {"bias"}),
}
TABLE = {row.key: row for row in invariance_table()}


def test_the_table_is_complete():
    assert set(TABLE) == set(THEORY)
    assert set(METHODS) <= set(TABLE)


@pytest.mark.parametrize("key", THEORY)
def test_measured_invariances_are_those_of_theory(key):
    weight, with_bias, data, degree, shifts = THEORY[key]
    row = TABLE[key]
    assert (row.weight, row.weight_and_bias, row.data) == (weight, with_bias, data)
    assert set(row.shifts) == shifts
    assert degree is None or row.degree == pytest.approx(degree, abs=1e-8)


@pytest.mark.parametrize("key", METHODS)
def test_rows_of_the_table_claim_what_is_measured(key):
    """`scale_unit`, `scale_with_bias` and `shifts` of a row are what optimizers rely on."""
    row, measured = METHODS[key], TABLE[key]
    found = measured.weight_and_bias if row.scale_with_bias else measured.weight
    assert found == row.scale_unit
    assert set(row.shifts) <= set(measured.shifts)


@pytest.mark.parametrize("key", METHODS)
def test_eps_leaks_where_there_is_one_and_only_there(key):
    row = TABLE[key]
    assert (row.leak > 1e-9) == (row.eps > 0)
    assert row.leak < 1e-2


def test_residuals_separate_exact_from_broken():
    """Nothing lies between rounding and a real change: the threshold decides nothing.

    How large a real change is depends on the random draws, which differ between processors.
    """
    for row in TABLE.values():
        for what, residual in row.residuals.items():
            assert residual < 1e-13 or residual > 1e-5, (row.key, what, residual)


def test_a_false_invariance_is_seen(generator):
    """A layer that only nearly forgets its scale is not called invariant."""

    def nearly(weight, bias, data):
        z = torch.einsum("oi,bis->bos", weight, data)
        return z / z.norm(dim=(0, 2), keepdim=True) ** (1 - 1e-6)

    row = measure("nearly", "nearly", nearly, nearly, 0.0, generator, 7)
    assert row.weight == "none"
