"""Formulas come out as MathML that browsers draw, and what does not is an error."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("latex2mathml")
pytest.importorskip("sphinx")
PLACE = Path(__file__).parents[2] / "docs" / "extensions" / "mathml.py"


@pytest.fixture(scope="module")
def mathml():
    spec = importlib.util.spec_from_file_location("mathml", PLACE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mathml


def test_a_formula_keeps_its_latex_for_those_who_do_not_see_it(mathml):
    assert 'alttext="\\eta/|w|^2"' in mathml(r"\eta/|w|^2", "inline")
    assert 'display="block"' in mathml("a = b", "block")


def test_bars_open_and_close(mathml):
    found = mathml("|a| + |b|", "inline")
    assert found.count('form="prefix"') == found.count('form="postfix"') == 2


def test_alphabets_are_letters_and_names_are_one_word(mathml):
    assert "ℝ" in mathml(r"\mathbb R", "inline")
    assert "<mo>sign</mo>" in mathml(r"\mathrm{sign} x", "inline")


@pytest.mark.parametrize("latex", [r"\notacommand x", r"a & b"])
def test_what_has_no_mathml_is_an_error(mathml, latex):
    with pytest.raises(ValueError, match="no MathML"):
        mathml(latex, "inline")
