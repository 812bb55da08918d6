import pytest

from onsphere.errors import OnsphereError
from onsphere.studies import study as study_file
from onsphere.studies.claims.base import SCALES, Plan
from onsphere.studies.engine.job import Outcome
from onsphere.studies.engine.machine import Machine, this_machine
from onsphere.studies.engine.store import Store
from onsphere.studies.setup.data import Source
from onsphere.studies.study import CLAIMS, claims, study
from studies import tiny
from studies.fabricated import records


def test_claims_come_in_the_order_of_the_report():
    assert [claim.name for claim in claims([])] == [n for n in CLAIMS if n != "causes"]
    assert [claim.name for claim in claims(["causes"])] == ["causes"]
    assert [claim.name for claim in claims(["gain", "sphere", "gain"])] == ["sphere", "gain"]


def test_the_document_says_how_to_make_it_again(undisturbed, tiny_scale):
    document = tiny.run(undisturbed)
    assert [section.name for section in document.sections] == ["gain"]
    assert document.provenance["command"] == "onsphere study gain --quick"
    assert document.provenance["cells"] == "7"
    assert len(document.warnings) == 2


def test_records_of_two_kinds_of_machines_are_told_apart(copy, tiny_scale):
    here = str(this_machine())
    assert tiny.run(copy).provenance["processor"] == here
    store, cell = Store(copy), CLAIMS["gain"].cells(tiny.PLAN)[0]
    outcome = Outcome(store.read(cell), store.tensors(cell))
    store.write(cell, outcome, Machine("another processor", "AVX2"))
    document = tiny.run(copy)
    assert document.provenance["processor"] == (
        f"{here}: 13 of 14 cells; another processor (AVX2): 1 of 14 cells"
    )
    assert "2 kinds of processors" in document.warnings[-1]
    assert len(document.warnings) == 3


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(), "onsphere study gain"),
        (Plan("mnist", (0, 1)), "onsphere study gain --data mnist --seeds 2"),
        (Plan(seeds=(0,), size="quick"), "onsphere study gain --quick"),
        (Plan(seeds=tuple(range(10)), size="full"), "onsphere study gain --full"),
    ],
)
def test_the_command_names_what_is_not_the_default(plan, words):
    assert study_file._command(plan, "gain") == words


@pytest.mark.parametrize(
    ("names", "plan", "jobs", "says"),
    [
        (["gian"], Plan(), 1, "unknown claim 'gian'; did you mean 'gain'"),
        ([], Plan(seeds=()), 1, "at least one seed"),
        ([], Plan(), 0, "--jobs must be at least 1"),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(tmp_path, names, plan, jobs, says):
    with pytest.raises(OnsphereError, match=says):
        study(names, plan, Source("digits"), tmp_path / "out", jobs=jobs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", SCALES)
def test_every_method_is_in_every_claim_at_every_size(size):
    plan = Plan(seeds=tuple(range(SCALES[size].seeds)), size=size)
    for name, claim in CLAIMS.items():
        configs = [cell.config.get("training", cell.config) for cell in claim.cells(plan)]
        methods, seeds = ({config[what] for config in configs} for what in ("method", "seed"))
        without = {"sphere": {"none"}, "gain": {"none", "sn"}}.get(name, set())
        assert methods == set(plan.methods) - without
        assert seeds == set(plan.seeds)


def test_verdicts_that_rest_on_training_have_three_seeds_and_rates_four_decades():
    from onsphere.studies.claims.stability import rates

    assert SCALES["default"].seeds >= 3
    for size in SCALES:
        found = rates(Plan(size=size))
        assert found[-1] / found[0] >= 0.999e4
        assert list(found) == sorted(found)


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_same_records_make_the_same_section(claim):
    sections = [
        CLAIMS[claim].section(Plan(size="quick"), records(claim), "onsphere") for _ in range(2)
    ]
    assert repr(sections[0]) == repr(sections[1])
