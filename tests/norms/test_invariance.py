"""The measured table against the theory, the negative controls included."""

import importlib
import re
from functools import partial

import pytest
import torch
from torch import nn

from onsphere.norms import METHODS, TABLE, ActivationNorm, invariance_table, parametrize
from onsphere.norms.invariance import measure

# Theory: finest scale group of the weight, the same with the bias, invariance to the data's scale,
# degree, shifts that change nothing.
THEORY = {
    "bn": ("filter", "filter", True, 0.0, {"bias"}),
    "ln": ("none", "layer", True, 0.0, {"layer rows"}),
    "in": ("filter", "filter", True, 0.0, {"bias"}),
    "gn": ("none", "group", True, 0.0, {"layer rows", "group rows"}),
    "rms": ("none", "layer", True, 0.0, set()),
    "sbn": ("filter", "filter", True, 0.0, {"bias"}),
    "l1bn": ("filter", "filter", True, 0.0, {"bias"}),
    "frn": ("none", "filter", True, 0.0, set()),
    "scale": ("none", "layer", True, 0.0, set()),
    "pixel": ("none", "layer", True, 0.0, set()),
    "wn": ("filter", "none", False, 0.0, set()),
    "cwn": ("filter", "none", False, 0.0, {"row entries"}),
    "ws": ("filter", "none", False, 0.0, {"row entries"}),
    "sn": ("layer", "none", False, 0.0, set()),
    "demod": ("filter", "none", False, 0.0, set()),
    "ngpt": ("filter", "none", False, 0.0, set()),
    "brn": ("none", "none", False, 1.0, set()),
    "grn": ("none", "none", False, 1.0, set()),
    "qk": ("none", "group", True, 0.0, set()),
    "cos": ("filter", "none", True, 0.0, set()),
    "switch": ("none", "layer", True, 0.0, {"layer bias"}),
    "evo": ("none", "none", False, None, set()),
    "dora": ("filter", "none", False, 0.0, set()),
    "dyt": ("none", "none", False, None, set()),
    "lrn": ("none", "none", False, None, set()),
    "robust": ("none", "none", False, 0.8, {"bias"}),
    "softmax head": ("none", "none", False, None, {"layer rows"}),
}
MEASURED = {row.key: row for row in invariance_table()}


def test_the_table_is_complete():
    assert set(MEASURED) == set(THEORY)
    assert set(TABLE) == set(MEASURED) - {"softmax head"}


@pytest.mark.parametrize("key", THEORY)
def test_measured_invariances_are_those_of_theory(key):
    weight, with_bias, data, degree, shifts = THEORY[key]
    row = MEASURED[key]
    assert (row.weight, row.weight_and_bias, row.data) == (weight, with_bias, data)
    assert set(row.shifts) == shifts
    assert degree is None or row.degree == pytest.approx(degree, abs=1e-8)


@pytest.mark.parametrize("key", TABLE)
def test_rows_of_the_table_claim_what_is_measured(key):
    """`scale_unit`, `scale_with_bias` and `shifts` of a row are what optimizers rely on."""
    row, measured = TABLE[key], MEASURED[key]
    found = measured.weight_and_bias if row.scale_with_bias else measured.weight
    assert found == row.scale_unit
    assert set(row.shifts) <= set(measured.shifts)


@pytest.mark.parametrize("key", [key for key, row in TABLE.items() if row.scale_unit != "none"])
def test_eps_leaks_where_there_is_one_and_only_there(key):
    """Where eps is only the least length that divides, it leaks at lengths below it alone."""
    row = MEASURED[key]
    clamps = key == "cos" or (key in METHODS and METHODS[key].eps_place == "clamp")
    assert (row.leak > 1e-9) == (row.eps > 0 and not clamps)
    assert row.leak < 1e-2


@pytest.mark.parametrize("key", [key for key in TABLE if key not in METHODS])
def test_what_is_no_single_projection_says_why_and_names_its_module(key):
    row = TABLE[key]
    assert row.why.endswith(".")
    assert (row.scale_unit == "none") == bool(re.search(r"no sphere|scale counts", row.why))
    package, _, name = row.module.rpartition(".")
    assert callable(getattr(importlib.import_module(package), name))
    for make in (partial(ActivationNorm, size=3), partial(parametrize, nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=f"not one projection: use {row.module}"):
            make(method=key)


def test_residuals_separate_exact_from_broken():
    """Nothing lies between rounding and a real change: the threshold decides nothing.

    How large a real change is depends on the random draws, which differ between processors.
    """
    for row in MEASURED.values():
        for what, residual in row.residuals.items():
            assert residual < 1e-13 or residual > 1e-5, (row.key, what, residual)


def test_a_false_invariance_is_seen(generator):
    """A layer that only nearly forgets its scale is not called invariant."""

    def nearly(weight, bias, data):
        z = torch.einsum("oi,bis->bos", weight, data)
        return z / z.norm(dim=(0, 2), keepdim=True) ** (1 - 1e-6)

    row = measure("nearly", "nearly", nearly, nearly, 0.0, generator, 7)
    assert row.weight == "none"
