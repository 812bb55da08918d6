import json

import pytest

from onsphere.errors import OnsphereError
from onsphere.studies import study as study_file
from onsphere.studies.claims.base import Claim, Details
from onsphere.studies.claims.plan import SCALES, Plan
from onsphere.studies.claims.statement import Statement, decide
from onsphere.studies.engine.job import Cell, Outcome, Task
from onsphere.studies.engine.machine import Machine, this_machine
from onsphere.studies.engine.store import Store
from onsphere.studies.setup.data import Source
from onsphere.studies.study import CLAIMS, claims, study
from studies import tiny
from studies.fabricated import PLAN, records


def test_claims_come_in_the_order_of_the_report():
    assert [claim.name for claim in claims([])] == list(CLAIMS)
    assert [claim.name for claim in claims(["gain", "sphere", "gain"])] == ["sphere", "gain"]


def test_claims_that_make_no_sense_in_a_network_are_left_out_and_refused():
    left = [claim.name for claim in claims([], "vit-tiny")]
    assert left == ["sphere", "stability", "robustness"]
    with pytest.raises(OnsphereError, match="spheres of their own"):
        claims(["growth"], "vit-tiny")


@pytest.mark.parametrize("network", ["resnet20", "vit-tiny"])
def test_every_network_can_be_asked_what_is_left(network):
    plan = Plan(seeds=(0, 1, 2), network=network)
    for claim in claims([], network):
        assert claim.cells(plan)
        for one in claim.statements:
            assert set(one.methods(plan)) <= set(plan.methods)


def test_the_document_says_how_to_make_it_again(undisturbed, tiny_scale):
    document = tiny.run(undisturbed)
    assert [section.name for section in document.sections] == ["gain"]
    assert document.provenance["command"] == "onsphere study gain --quick"
    assert document.provenance["cells"] == "14"
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
        (Plan(seeds=tuple(range(8))), "onsphere study gain"),
        (Plan("mnist", (0, 1)), "onsphere study gain --data mnist --seeds 2"),
        (Plan("my $5.npz@0123", (0, 1)), "onsphere study gain --data 'my $5.npz' --seeds 2"),
        (Plan(seeds=(0,), size="quick"), "onsphere study gain --quick"),
        (Plan(seeds=tuple(range(20)), size="full"), "onsphere study gain --full"),
        (
            Plan(seeds=tuple(range(32)), looks=(4, 8, 16, 24, 32)),
            "onsphere study gain --until-decided",
        ),
        (
            Plan(seeds=tuple(range(6)), looks=(4, 6)),
            "onsphere study gain --until-decided --seeds 6",
        ),
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
def test_every_statement_is_asked_of_a_method_at_every_size(size):
    scale = SCALES[size]
    plan = Plan(seeds=tuple(range(scale.seeds)), size=size)
    for claim in CLAIMS.values():
        for one in claim.statements:
            assert one.methods(plan)
            assert set(one.methods(plan)) <= set(plan.methods)
    assert scale.looks == tuple(sorted(set(scale.looks)))
    assert len(scale.looks) >= 2


def test_training_is_decided_by_more_than_three_seeds_unless_few_show_it():
    assert SCALES["default"].seeds >= 8
    assert SCALES["default"].few >= 3


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_same_records_make_the_same_section(claim):
    def section():
        results = records(claim)
        decisions = decide(CLAIMS[claim].statements, PLAN, results)
        return CLAIMS[claim].section(PLAN, results, decisions, "onsphere")

    assert repr(section()) == repr(section())


def test_the_rules_are_written_before_the_measurement_and_a_late_change_is_told(
    undisturbed, copy, tiny_scale
):
    (path,) = undisturbed.glob("rules/gain-*.json")
    written = json.loads(path.read_text())
    assert written["records_before"] == 0
    assert [rule["statement"] for rule in written["rules"]] == [
        one.name for one in CLAIMS["gain"].statements
    ]
    document = tiny.run(copy)
    assert "written before anything was measured" in document.sections[0].conditions[-1]
    (copy / "rules" / path.name).unlink()  # as if the text had changed since
    document = tiny.run(copy)
    assert "of the claim's records were there already" in document.sections[0].conditions[-1]


def test_rules_that_cannot_be_written_are_told_before_the_measurement(tmp_path, tiny_scale):
    (tmp_path / "rules").write_text("no folder")
    with pytest.raises(OnsphereError, match=r"cannot write the rules .*; choose another folder"):
        tiny.run(tmp_path)
    assert not list(tmp_path.glob("records/*.json"))


@pytest.fixture
def coins(monkeypatch):
    """A claim of one comparison on numbers that cost nothing: ``of`` sets each seed's value."""
    values = {}

    def cells(plan, method, seed):
        return [Cell(DRAW, {"seed": seed, "value": values.get(seed, 0.0), "method": method})]

    one = Statement(
        "coin", "A coin shows more heads.", "heads", 0.5, lambda plan: ("bn",), cells,
        lambda records: [own["value"] for (own,) in records],
    )  # fmt: skip
    claim = Claim("coins", "", "", "", (one,), lambda outcomes: "Toss.", lambda *_: Details())
    monkeypatch.setitem(study_file.CLAIMS, "coins", claim)
    return values


def draw(config, inputs):
    return Outcome({"value": config["value"]})


DRAW = Task("draw", 1, draw)
LOOKS = (4, 8, 16)


def toss(folder, values, coins, **options):
    coins.update(enumerate(values))
    plan = Plan("digits", tuple(range(LOOKS[-1])), looks=LOOKS)
    return study(["coins"], plan, Source("digits"), folder, **options)


def test_what_is_decided_costs_no_more_seeds(tmp_path, coins):
    sure = [1.0 + 0.001 * (seed % 2) for seed in range(16)]
    document = toss(tmp_path, sure, coins)
    assert document.sections[0].statements[0].outcome == "holds"
    assert len(list(tmp_path.glob("records/*.json"))) == 4
    assert document.provenance["seeds"] == "4"


def test_what_is_open_gets_all_the_seeds(tmp_path, coins):
    said = []
    document = toss(
        tmp_path, [2.0 * (-1) ** seed for seed in range(16)], coins, announce=said.append
    )
    assert document.sections[0].statements[0].outcome == "undecided"
    assert len(list(tmp_path.glob("records/*.json"))) == 16
    assert said[0].startswith("After 4 seeds, 0 of 1 comparisons are decided")
    assert document.sections[-1].name == "pilot"
    assert document.sections[-1].tables[0].rows[0][4] == 16


def test_no_look_is_begun_that_would_end_after_the_budget(tmp_path, coins):
    document = toss(tmp_path, [2.0 * (-1) ** seed for seed in range(16)], coins, budget=1e-9)
    assert len(list(tmp_path.glob("records/*.json"))) == 4
    assert "The time was up after 4 seeds" in document.warnings[-1]
    again = toss(tmp_path, [2.0 * (-1) ** seed for seed in range(16)], coins)
    assert len(list(tmp_path.glob("records/*.json"))) == 16
    assert not any("time was up" in warning for warning in again.warnings)


def test_the_look_at_which_the_time_is_up_takes_all_of_the_level(tmp_path, coins):
    values = [1.0 + 0.4 * (-1) ** seed for seed in range(16)]
    early = toss(tmp_path, values, coins, budget=1e-9)
    assert early.sections[0].statements[0].outcome == "holds"
    assert "took all that was left of the 5 %" in early.warnings[-1]
    assert early.sections[0].statements[0].effect == "1 [0.0355, 1.96]"
    assert toss(tmp_path, values, coins, budget=1e-9).warnings == early.warnings
    # With more time the study goes on as if it had not ended, and says what the end has cost.
    later = toss(tmp_path, values, coins)
    assert later.provenance["seeds"] == "8"  # 4 are too few where others may follow
    assert "earlier run was up after 4 seeds" in later.warnings[-1]
    assert "up to twice as large (coins)" in later.warnings[-1]
    # What has been measured costs no time.
    assert toss(tmp_path, values, coins, budget=1e-9).warnings == later.warnings


def test_a_damaged_note_of_an_end_is_none(tmp_path, coins):
    values = [1.0 + 0.001 * (seed % 2) for seed in range(16)]
    (tmp_path / "rules").mkdir()
    for text in ("", "[3]", '{"coins": "x"}'):
        (tmp_path / "rules" / "closed.json").write_text(text)
        assert toss(tmp_path, values, coins).warnings == []
