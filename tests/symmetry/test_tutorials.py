"""Models as tutorials and popular repositories write them: the audit says what is right of each."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from onsphere.symmetry import Audit, audit
from symmetry.tutorials import (
    channels,
    decoders,
    encoders,
    experts,
    generative,
    graphs,
    heads,
    language,
    metric,
    quantized,
    recheck,
    sequence,
    vision,
)
from symmetry.tutorials.case import Case

TABLE: tuple[Case, ...] = (
    *language.CASES,
    *decoders.CASES,
    *encoders.CASES,
    *sequence.CASES,
    *experts.CASES,
    *vision.CASES,
    *channels.CASES,
    *graphs.CASES,
    *metric.CASES,
    *generative.CASES,
    *quantized.CASES,
    *heads.CASES,
)
LONG = {
    "Llama, a prompt and one more token", "Llama with a cache", "selective scan in place",
    "encoder and decoder, annotated", "GPT, one token", "GPT, tied, with dropout and loss",
    "translation with attention, taught", "translation with attention, greedy",
    "sparse experts, one each", "sparse experts, some of them not asked", "T5 encoder, tied",
    "sentiment of packed sentences", "shifted windows, cosine attention", "perceiver",
    "messages through edge matrices", "point cloud",
}  # fmt: skip
"""Models that take some seconds each, 80 together: run with the slow tests."""
EACH = pytest.mark.parametrize("case", [
    pytest.param(c, marks=pytest.mark.slow if c.name in LONG else (), id=c.name) for c in TABLE
])  # fmt: skip


def audited(case: Case) -> Audit:
    args, kwargs = case.given()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm
        return audit(case.model(), args, kwargs)


def span(case: Case, vectors: Iterable[Mapping[str, Any]], parameters: Iterable[str]) -> Any:
    """The space of exponents, written in the one way that does not depend on a basis."""
    return recheck.reduced(list(vectors), [n for n in parameters if n not in case.unreached])


@EACH
def test_the_audit_is_right(case: Case) -> None:
    found = audited(case)
    assert found.unknown_ops == []
    assert sorted(found.inert) == sorted(case.inert)
    names = list(found.parameters)
    assert span(case, found.scale_symmetries, names) == span(case, case.basis, names)
    own = found.own_spheres()
    assert sorted(own) == sorted(case.spheres)
    said = {n: own[n].granularity for n in case.granularity}
    assert said == dict(case.granularity)
    if case.limits:  # one token, or few: others were tried, and it is said
        assert any("other lengths" in words for words in found.conditions)


@pytest.mark.slow
@EACH
def test_the_table_is_right(case: Case) -> None:
    bare = recheck.Bare(case)
    for exponents in case.basis:
        assert recheck.change_under(bare, exponents) < 1e-8, exponents
    if case.jumps:
        assert recheck.more_by_trying(bare, case.basis) == []
    else:
        assert len(recheck.free_directions(bare)) == len(case.basis)
    for name in bare.parameters:
        replaced = recheck.change(bare, recheck.replaced(name), range(6))
        assert (replaced < 1e-8) == (name in case.inert), name
        alone = recheck.change_under(bare, {name: 1}) < 1e-8 and name not in case.inert
        assert alone == (name in case.spheres), name
    for name, words in case.granularity.items():
        assert recheck.how_fine(bare, name) in words, name


def test_the_table_is_large_and_names_are_unique() -> None:
    assert len({c.name for c in TABLE}) == len(TABLE)
    assert {c.name for c in TABLE} >= LONG
    assert len(TABLE) >= 60
