"""Ctrl-C while worker processes start: what was begun is ended first, whichever thread hears it."""

import os
import signal
import threading
from multiprocessing import synchronize, util

import pytest

from onsphere.studies.engine import process_pool
from onsphere.studies.engine.process_pool import Workers

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "pthread_sigmask"), reason="signals as on Linux"
)


@pytest.fixture(autouse=True)
def spawned(monkeypatch):
    """Start processes as a study does."""
    monkeypatch.setattr(process_pool, "_START", "spawn")


@pytest.fixture(autouse=True)
def heeds_ctrl_c():
    """Whatever the caller set, and with a second thread that the signal may go to."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def pressed(monkeypatch):
    """Press Ctrl-C before a function of a module runs; return the calls that came to their end."""

    def press(owner, name):
        ended, function = [], getattr(owner, name)

        def interrupted(*args):
            os.kill(os.getpid(), signal.SIGINT)
            made = function(*args)
            ended.append(made)
            return made

        monkeypatch.setattr(owner, name, interrupted)
        return ended

    return press


def test_a_pool_is_made_before_ctrl_c_is_heard(pressed):
    """A semaphore left half made is told on exit, in a second line."""
    ended = pressed(synchronize.SemLock, "_make_methods")
    with pytest.raises(KeyboardInterrupt):
        Workers(1)
    assert len(ended) > 2


def test_a_process_has_started_before_ctrl_c_is_heard(pressed):
    """One that is left without what it shall do fails with lines of its own."""
    with Workers(1) as pool:
        started = pressed(util, "spawnv_passfds")
        with pytest.raises(KeyboardInterrupt):
            pool.submit(abs, -1)
        assert len(started) == 1
        assert [process.pid for process in pool._processes.values()] == started
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_heard_afterwards_and_another_thread_has_no_handler_to_hold():
    found = []
    with Workers(1) as pool:
        thread = threading.Thread(target=lambda: found.append(pool.submit(abs, -1).result()))
        thread.start()
        thread.join()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert found == [1]
