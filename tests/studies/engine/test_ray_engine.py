"""Cells as tasks of a cluster of two machines, as far as one machine can play two.

Without Ray, only what needs none runs: ``make test-ray`` installs it.
"""

import importlib
import os
import signal
import socket
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from onsphere.errors import OnsphereError
from onsphere.studies.engine import ray_engine, runner
from onsphere.studies.engine.job import Cell, Outcome, Task
from onsphere.studies.engine.ray_engine import RETRIES, RayEngine
from onsphere.studies.engine.store import Store
from onsphere.studies.setup.data import Source
from onsphere.studies.study import CLAIMS
from studies import tiny
from studies.stopping import TESTS, kill_after, records_in, session, start, wait_for

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def logged(config, inputs):
    """Add up, write down that it ran, and die as often as it shall."""
    log = Path(config["log"])
    with log.open("a") as stream:
        stream.write(f"{config['x']}\n")
    if log.read_text().split().count(str(config["x"])) <= config.get("dies", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if config.get("fails"):
        raise ArithmeticError("this task fails")
    before = sum(int(tensors["sum"]) for tensors in inputs.tensors)
    total = config["x"] + before + len(inputs.images.train_y)
    return Outcome({"sum": total, "threads": torch.get_num_threads()}, {"sum": torch.tensor(total)})


LOGGED = Task("logged", 1, logged)


def pyramid(log, **of_the_middle):
    """Return six cells: three, two that build on all of these, and one on top."""
    base = [Cell(LOGGED, {"x": x, "log": str(log)}) for x in (1, 2, 3)]
    middle = [
        Cell(LOGGED, {"x": 10, "log": str(log), **of_the_middle}, tuple(base)),
        Cell(LOGGED, {"x": 20, "log": str(log)}, tuple(base)),
    ]
    return [*base, *middle, Cell(LOGGED, {"x": 100, "log": str(log)}, tuple(middle))]


def runs(log):
    return Counter(map(int, log.read_text().split()))


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Of workers that are killed, and of pipes to them.
        patch.setenv("PYTHONWARNINGS", "ignore")
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)  # for tasks of these tests
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        made.add_node(num_cpus=1)
        yield made
        made.shutdown()


@pytest.fixture
def engine(cluster):
    with RayEngine(cluster.address) as engine:
        yield engine


def test_a_killed_worker_costs_one_more_run_of_its_cell(tmp_path, engine):
    cells = pyramid(tmp_path / "log", dies=1)
    runner.run(cells, Store(tmp_path / "ray"), Source("digits"), engine=engine)
    assert runs(tmp_path / "log") == {1: 1, 2: 1, 3: 1, 10: 2, 20: 1, 100: 1}
    # The log is the same one, so now the cell lives.
    runner.run(cells, Store(tmp_path / "local"), Source("digits"), jobs=2)
    whole = tiny.contents(tmp_path / "local")
    assert len(whole) == 12
    assert tiny.contents(tmp_path / "ray") == whole
    assert Store(tmp_path / "ray").read(cells[-1])["threads"] == 1


def test_a_cell_that_always_kills_its_worker_is_given_up(tmp_path, engine):
    store, cells = Store(tmp_path), pyramid(tmp_path / "log", dies=99)
    with pytest.raises(OnsphereError, match=f"Ray lost a cell {RETRIES + 1} times") as caught:
        runner.run(cells, store, Source("digits"), engine=engine)
    assert "what had finished is kept" in str(caught.value)
    assert runs(tmp_path / "log")[10] == RETRIES + 1
    assert all(store.has(cell) for cell in cells[:3])


def test_what_a_task_raises_is_raised_here_and_it_runs_once(tmp_path, engine):
    with pytest.raises(ArithmeticError, match="this task fails"):
        runner.run(
            pyramid(tmp_path / "log", fails=True), Store(tmp_path), Source("digits"), engine=engine
        )
    assert runs(tmp_path / "log")[10] == 1


def test_another_version_on_a_worker_is_told(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(ray_engine, "__version__", "0.0.1")
    with pytest.raises(OnsphereError, match=r"this study runs with onsphere 0\.0\.1"):
        runner.run(pyramid(tmp_path / "log"), Store(tmp_path), Source("digits"), engine=engine)
    assert not (tmp_path / "log").exists()


def test_a_worker_without_the_package_is_told(tmp_path, engine, monkeypatch):
    (tmp_path / "only_here.py").write_text("def compute(*_): pass\n")
    engine._connected()  # the workers have the paths of this moment
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ray_engine, "_compute", importlib.import_module("only_here").compute)
    with pytest.raises(OnsphereError, match=r"cannot import onsphere .*No module.*pip install"):
        runner.run(pyramid(tmp_path / "log"), Store(tmp_path), Source("digits"), engine=engine)


@pytest.mark.usefixtures("tiny_scale")
def test_a_study_writes_the_records_of_the_local_engine(tmp_path, engine, undisturbed):
    runner.run(CLAIMS["gain"].cells(tiny.PLAN), Store(tmp_path), Source("digits"), engine=engine)
    assert tiny.contents(tmp_path) == tiny.contents(undisturbed)


def test_a_study_killed_three_times_resumes_to_the_same_records(tmp_path, cluster, undisturbed):
    options = ("--engine", "ray", "--address", cluster.address)
    for more in (2, 3, 3):
        kill_after(tmp_path, more, options=options)
        assert 0 < len(records_in(tmp_path)) < len(records_in(undisturbed))
    last = start(tmp_path, options=options)
    _, error = last.communicate(timeout=300)
    assert last.returncode == 0, error
    assert tiny.contents(tmp_path) == tiny.contents(undisturbed)


@with_ray
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's process table")
@pytest.mark.parametrize("early", [True, False], ids=["while Ray starts", "while it works"])
def test_ctrl_c_is_one_line_and_leaves_no_process(tmp_path, early, undisturbed):
    process = start(tmp_path, options=("--engine", "ray"))
    if early:
        wait_for(lambda: len(session(process.pid)) > 2 or process.poll() is not None)
    else:
        wait_for(lambda: len(records_in(tmp_path)) >= 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    *progress, last = error.splitlines()
    assert last.startswith("onsphere: stopped; what had finished is kept")
    assert all(line.startswith("measuring ") for line in progress)
    wait_for(lambda: not session(process.pid), seconds=90)
    assert tiny.contents(tmp_path).items() <= tiny.contents(undisturbed).items()


@pytest.mark.slow  # two agents of Ray look for a minute for what has died, then end
@with_ray
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's process table")
def test_a_killed_study_takes_the_ray_that_it_started_with_it(tmp_path, undisturbed):
    workers = kill_after(tmp_path, 2, options=("--engine", "ray"), seconds=100.0)
    assert len(workers) > 4
    assert tiny.contents(tmp_path).items() <= tiny.contents(undisturbed).items()


# --- addresses, and Ray that is not there ----------------------------------------------------


@with_ray
def test_a_port_that_is_closed_is_one_line_at_once(command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code, out, error = command(
        "study", "gain", "--quick", "--engine", "ray", "--address", f"127.0.0.1:{port}"
    )
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert f"no Ray cluster answers at '127.0.0.1:{port}'" in error
    assert "refused" in error


@with_ray
def test_an_address_where_something_else_listens_is_one_line_in_time(command):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, began = server.getsockname()[1], time.monotonic()
        code, _, error = command(
            "study", "gain", "--quick", "--engine", "ray", "--address", f"127.0.0.1:{port}"
        )
    assert time.monotonic() - began < ray_engine.SECONDS_TO_ANSWER + 60  # to import Ray, too
    assert (code, error.count("\n")) == (2, 1)
    assert "(nothing within 10 seconds)" in error


@with_ray
def test_what_is_no_address_is_told_in_the_words_of_ray(command):
    code, _, error = command("study", "gain", "--quick", "--engine", "ray", "--address", "nonsense")
    assert (code, error.count("\n")) == (2, 1)
    assert "Invalid address format: nonsense" in error


def test_without_ray_the_line_says_what_to_install(command, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None)
    code, out, error = command("study", "gain", "--quick", "--engine", "ray")
    assert (code, out) == (2, "")
    assert error == 'onsphere: --engine ray needs Ray: pip install "onsphere[ray]"\n'
    assert list(tmp_path.iterdir()) == []


def test_no_jobs_are_refused():
    with pytest.raises(OnsphereError, match="at least 1, got 0"):
        RayEngine(jobs=0)
