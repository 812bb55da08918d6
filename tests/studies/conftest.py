"""What the tests of the studies share: the tiny study, run once without disturbance."""

import shutil

import pytest

import forks
from onsphere.studies.claims import plan
from onsphere.studies.engine import process_pool
from onsphere.studies.setup.data import Source
from studies import tiny


@pytest.fixture(scope="session", autouse=True)
def forked():
    """Fork the workers of this process; those of a study in another process start as ever."""
    forks.preload()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_pool, "_START", "forkserver")
        yield


@pytest.fixture(scope="session")
def digits():
    return Source("digits").load()


@pytest.fixture
def tiny_scale(monkeypatch):
    monkeypatch.setitem(plan.SCALES, "quick", tiny.TINY)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Records of the tiny study, run in one go by one worker. Not to be written to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.SCALES, "quick", tiny.TINY)
        tiny.run(folder)
    return folder


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A copy of the undisturbed records that a test may damage."""
    return shutil.copytree(undisturbed, tmp_path / "copy")


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch):
    """On a slow machine a study would say now and then how far it is."""
    monkeypatch.setattr("onsphere.report.progress.SECONDS_BETWEEN_LINES", float("inf"))
