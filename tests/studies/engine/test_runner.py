"""The runner with real worker processes: same bytes, only what is missing, nothing lost."""

import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from onsphere.errors import OnsphereError
from onsphere.studies.engine import runner
from onsphere.studies.engine.job import Cell, Outcome, Task
from onsphere.studies.engine.local import LocalEngine
from onsphere.studies.engine.store import Store
from onsphere.studies.engine.work import compute
from onsphere.studies.setup.data import Source
from onsphere.studies.study import CLAIMS
from studies import tiny
from studies.stopping import kill_after, records_in, start, wait_for

pytestmark = pytest.mark.usefixtures("tiny_scale")


def add(config, inputs):
    """A task without training: one more than what it builds on."""
    if config.get("fails"):
        raise RuntimeError("this task fails")
    if config.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome({"sum": config["x"] + sum(record["sum"] for record in inputs.records)})


ADD = Task("add", 1, add)


def cells_of(claim="gain"):
    return CLAIMS[claim].cells(tiny.PLAN)


def damage(records):
    """Spoil three records: one cut short, one with another digit, one that is another's."""
    half, flipped, foreign, source = records
    half.write_text(half.read_text()[:200])
    text = flipped.read_text()
    digit = next(i for i in range(text.index('"result"'), len(text)) if text[i] in "123456789")
    flipped.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    foreign.write_text(source.read_text())
    return half, flipped, foreign


def test_a_rerun_does_what_is_missing_or_damaged_and_nothing_else(copy, undisturbed):
    records = sorted(copy.glob("records/*.json"))
    lost = max(copy.glob("networks/*.safetensors"))
    damaged = damage([path for path in records if path.stem != lost.stem][:4])
    gone = records[-3:]
    for path in {*gone, lost}:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in copy.glob("*/*.*")}
    seen = []
    with pytest.warns(UserWarning, match="computed again") as warned:
        runner.run(cells_of(), Store(copy), Source("digits"), report=seen.append)
    assert len(warned) == 3
    assert tiny.contents(copy) == tiny.contents(undisturbed)
    aside = {path.name for path in copy.glob("records/*.corrupt")}
    assert aside == {f"{path.name}.corrupt" for path in damaged}
    wanted = {path.stem for path in (*gone, lost, *damaged)}
    assert {p.stem for p, when in kept.items() if p.stat().st_mtime_ns != when} <= wanted
    assert [p.cells_done for p in seen] == list(range(len(wanted) + 1))
    assert seen[-1].done == pytest.approx(seen[-1].total)


def test_nothing_missing_starts_no_worker(undisturbed, monkeypatch):
    monkeypatch.setattr(LocalEngine, "submit", None)
    runner.run(cells_of(), Store(undisturbed), Source("digits"))


def test_every_cell_of_a_study_depends_on_its_seed_and_data():
    other = {"seed": tiny.Plan("digits", (1,), "quick"), "data": tiny.Plan("mnist", (0,), "quick")}
    for name, claim in CLAIMS.items():
        keys = {cell.key for cell in claim.cells(tiny.PLAN)}
        for what, plan in other.items():
            assert not keys & {cell.key for cell in claim.cells(plan)}, (name, what)


def test_a_failing_task_loses_nothing_finished(tmp_path):
    first = Cell(ADD, {"x": 1}, cost=9.0)
    bad = Cell(ADD, {"x": 2, "fails": True}, (first,))
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="this task fails"):
        runner.run([bad], store, Source("digits"))
    assert store.read(first) == {"sum": 1}
    assert store.read(bad) is None


def test_a_killed_worker_is_told_in_one_line(tmp_path):
    first = Cell(ADD, {"x": 1})
    store = Store(tmp_path)
    with pytest.raises(OnsphereError, match="worker process was killed"):
        runner.run([Cell(ADD, {"x": 2, "dies": True}, (first,))], store, Source("digits"))
    assert store.read(first) == {"sum": 1}


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    store, first = Store(tmp_path), Cell(ADD, {"x": 1})
    runner.run([first], store, Source("digits"))

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onsphere.studies.engine.store.write_whole", full)
    with pytest.raises(OnsphereError, match=r"written \(No space.*what had finished is kept"):
        runner.run([Cell(ADD, {"x": 2}, (first,))], store, Source("digits"))
    assert store.read(first) == {"sum": 1}


class Finished:
    """An engine whose cells have all ended when it is asked, the first of them badly."""

    most = 9

    def submit(self, work, source):
        future = Future()
        try:
            future.set_result(compute(work, lambda: None))
        except RuntimeError as error:
            future.set_exception(error)
        return future


def test_what_finished_beside_a_failing_task_is_kept(tmp_path):
    store, good = Store(tmp_path), [Cell(ADD, {"x": x}) for x in range(5)]
    bad = Cell(ADD, {"x": 9, "fails": True}, cost=9.0)
    with pytest.raises(RuntimeError, match="this task fails"):
        runner.run([bad, *good], store, Source("digits"), engine=Finished())
    assert all(store.has(cell) for cell in good)


@pytest.mark.parametrize("jobs", [0, -3])
def test_no_jobs_are_refused(tmp_path, jobs):
    with pytest.raises(OnsphereError, match=f"at least 1, got {jobs}"):
        runner.run([Cell(ADD, {"x": 1})], Store(tmp_path), Source("digits"), jobs=jobs)


# --- studies that are stopped from outside -------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's process table")
def test_a_killed_study_leaves_no_orphan_and_resumes_to_the_same_records(tmp_path, undisturbed):
    assert kill_after(tmp_path, more=2)
    found, whole = tiny.contents(tmp_path), tiny.contents(undisturbed)
    assert 0 < len(records_in(tmp_path)) < len(records_in(undisturbed))
    assert all(whole[name] == content for name, content in found.items())
    tiny.run(tmp_path)
    assert tiny.contents(tmp_path) == whole


@pytest.mark.parametrize("early", [True, False], ids=["while workers start", "while they work"])
def test_ctrl_c_is_one_line_and_keeps_what_had_finished(tmp_path, undisturbed, early):
    process = start(tmp_path, jobs="1")
    wait_for(lambda: (tmp_path / "records" / "format").exists() or process.poll() is not None)
    if early:
        time.sleep(0.3)
    else:
        wait_for(lambda: len(records_in(tmp_path)) >= 2)
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    # On a slow machine the first cells take so long that lines of progress stand before it.
    (said,) = [line for line in error.splitlines() if not line.startswith("measuring ")]
    assert said.startswith("onsphere: stopped; what had finished is kept")
    whole = tiny.contents(undisturbed)
    found = tiny.contents(tmp_path)
    assert found.items() <= whole.items()
    assert len(found) >= (0 if early else 2)


@pytest.mark.slow
def test_a_study_killed_three_times_resumes_to_the_same_records(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real scale
    script = ("-c", "import sys; from onsphere.cli import main; sys.exit(main(sys.argv[1:]))")
    for more in (2, 3, 3):
        assert kill_after(tmp_path / "killed", more, script)
    for name in ("killed", "whole"):
        tiny.run(tmp_path / name, jobs=2)
    assert tiny.contents(tmp_path / "killed") == tiny.contents(tmp_path / "whole")
