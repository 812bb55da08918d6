import re
from dataclasses import replace

import pytest

from onsphere.studies.engine.job import Cell, Outcome, Task, closure, digest

TASK = Task("square", 1, lambda config, inputs: Outcome({"y": config["x"] ** 2}))
BASE = Cell(TASK, {"x": 2, "seed": 0})


def test_the_key_is_a_hash_of_the_configuration_and_not_of_its_order():
    assert BASE.key == Cell(TASK, {"seed": 0, "x": 2}, cost=9.0).key
    assert re.fullmatch(r"[0-9a-f]{20}", BASE.key)


@pytest.mark.parametrize(
    "other",
    [
        Cell(TASK, {"x": 3, "seed": 0}),
        Cell(TASK, {"x": 2, "seed": 1}),
        Cell(TASK, {"x": 2, "seed": 0, "more": None}),
        Cell(replace(TASK, version=2), BASE.config),
        Cell(replace(TASK, name="cube"), BASE.config),
        Cell(TASK, BASE.config, needs=(BASE,)),
    ],
    ids=["value", "seed", "more", "version", "task", "needs"],
)
def test_whatever_the_record_depends_on_changes_the_key(other):
    assert other.key != BASE.key


def test_a_key_follows_what_the_cell_builds_on():
    keys = {Cell(TASK, {"x": 5}, needs=(Cell(TASK, {"x": x}),)).key for x in (1, 2)}
    assert len(keys) == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_refused(number):
    with pytest.raises(ValueError, match="JSON"):
        digest({"x": number})


def test_closure_has_each_key_once_and_needs_first():
    middle = Cell(TASK, {"x": 3}, needs=(BASE,))
    twin = Cell(TASK, {"x": 2, "seed": 0})
    top = Cell(TASK, {"x": 4}, needs=(middle, twin))
    assert [cell.key for cell in closure([top, middle])] == [BASE.key, middle.key, top.key]
