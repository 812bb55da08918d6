import json
import os
import time

import pytest
import torch

from onsphere.errors import OnsphereError
from onsphere.studies.engine import store as store_file
from onsphere.studies.engine.job import Cell, Outcome, Task
from onsphere.studies.engine.machine import Machine, this_machine
from onsphere.studies.engine.store import Store

TASK = Task("square", 1, lambda config, inputs: Outcome({}))
CELL, OTHER = Cell(TASK, {"x": 2}), Cell(TASK, {"x": 3})
OUTCOME = Outcome({"y": 4.25, "z": [1, None]}, {"w": torch.arange(6.0).reshape(2, 3).T})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "out")


def record_of(store, cell=CELL):
    return store.records / f"{cell.key}.json"


def test_what_was_written_is_read(store):
    assert not store.has(CELL)
    store.write(CELL, OUTCOME)
    assert store.read(CELL) == OUTCOME.result
    assert torch.equal(store.tensors(CELL)["w"], OUTCOME.tensors["w"])
    assert store.read(OTHER) is None
    assert store.tensors(OTHER) == {}


def test_the_same_outcome_is_the_same_bytes(store, tmp_path):
    again = Store(tmp_path / "again")
    store.write(CELL, OUTCOME)
    again.write(CELL, Outcome(dict(reversed(OUTCOME.result.items())), OUTCOME.tensors))
    assert record_of(store).read_bytes() == record_of(again).read_bytes()


def test_another_machine_writes_another_record_under_the_same_name(store):
    """So that a study begun on one machine is gone on with on another."""
    store.write(CELL, OUTCOME)
    assert store.machine(CELL) == this_machine()
    other = Machine("another processor", "AVX2")
    store.write(CELL, OUTCOME, other)
    assert store.read(CELL) == OUTCOME.result
    assert store.machine(CELL) == other


def test_a_record_from_before_machines_were_recorded_is_read(store):
    store.write(CELL, OUTCOME)
    path = record_of(store)
    record = json.loads(path.read_text())
    del record["machine"]
    path.write_text(json.dumps(record))
    assert store.read(CELL) == OUTCOME.result
    assert store.machine(CELL) is None


def flip(text):
    return text.replace("4.25", "4.26")


def of_another_cell(text):
    return json.dumps({**json.loads(text), "cell": OTHER.identity})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "\x00\x01" + text, "cannot be read"),
        (flip, "checksum"),
        (lambda text: text.replace("4.25", "NaN"), "checksum"),
        (lambda text: text.replace("4.25", "1e999"), "checksum"),
        (lambda text: json.dumps({"cell": CELL.identity}), "checksum"),
        (of_another_cell, "another cell"),
        (lambda text: "[1, 2]", "another cell"),
    ],
    ids=["half", "empty", "binary", "flipped", "nan", "inf", "no result", "other", "list"],
)
def test_a_damaged_record_is_set_aside_with_a_warning(store, damage, why):
    store.write(CELL, OUTCOME)
    path = record_of(store)
    damaged = damage(path.read_text())
    path.write_text(damaged)
    with pytest.warns(UserWarning, match=rf"set aside as {path.name}.corrupt: .*{why}"):
        assert store.read(CELL) is None
    assert not path.exists()
    assert path.with_name(path.name + ".corrupt").read_text() == damaged


def test_a_damaged_record_that_another_run_has_set_aside_meanwhile_is_missing(store, monkeypatch):
    store.write(CELL, OUTCOME)

    def loads(_):
        record_of(store).unlink()
        raise ValueError

    monkeypatch.setattr("onsphere.studies.engine.store.json.loads", loads)
    with pytest.warns(UserWarning, match="set aside"):
        assert store.read(CELL) is None


def test_bytes_that_are_no_text_are_set_aside(store):
    record_of(store).write_bytes(b"\xff\xfe{}")
    with pytest.warns(UserWarning, match="UnicodeDecodeError"):
        assert not store.has(CELL)


def test_a_record_without_its_network_is_missing(store):
    store.write(CELL, OUTCOME)
    (store.networks / f"{CELL.key}.safetensors").unlink()
    assert not store.has(CELL)


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_network_is_missing(store, damage):
    store.write(CELL, OUTCOME)
    path = store.networks / f"{CELL.key}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert not store.has(CELL)


@pytest.mark.parametrize("written", ["0", "2", "", "a long story about another format"])
def test_records_of_another_version_are_refused_and_left_alone(store, written):
    store.write(CELL, OUTCOME)
    before = record_of(store).read_bytes()
    (store.records / "format").write_text(written)
    with pytest.raises(OnsphereError, match="choose another folder with --out"):
        Store(store.folder)
    assert record_of(store).read_bytes() == before


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OnsphereError, match="cannot write to the output folder"):
        Store(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_number_that_json_lacks_leaves_no_record(store):
    with pytest.raises(ValueError, match="JSON"):
        store.write(CELL, Outcome({"y": float("nan")}))
    assert [path.name for path in store.records.iterdir()] == ["format"]


def test_a_crash_while_writing_leaves_the_old_record(store, monkeypatch):
    store.write(CELL, OUTCOME)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.write(CELL, Outcome({"y": 5.0}))
    assert store.read(CELL) == OUTCOME.result
    assert not list(store.records.glob(".*.part"))


def test_old_leftovers_are_swept_and_those_of_running_studies_stay(store):
    for folder in (store.records, store.networks):
        for name, age in ((".old.1.part", 7200), (".new.2.part", 0)):
            (folder / name).write_text("{")
            os.utime(folder / name, (time.time() - age,) * 2)
    store.write(CELL, OUTCOME)
    store.sweep()
    left = {path.name for f in (store.records, store.networks) for path in f.glob(".*")}
    assert left == {".new.2.part"}
    assert store.has(CELL)


def test_leftovers_are_no_records(store):
    (store.records / f".{CELL.key}.json.77.part").write_text("{}")
    assert not store.has(CELL)
    assert int((store.records / "format").read_text()) == store_file.FORMAT
