"""Studies in processes of their own, which tests stop from outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from studies import tiny

TESTS = Path(__file__).parents[1]
TINY = ("-m", "studies.tiny")


def heeds_ctrl_c():
    """Whatever the caller set: background jobs ignore the signal, and a mask is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def start(folder, script=TINY, jobs="2", options=()):
    """Start the study in a session of its own, heeding Ctrl-C, as a terminal does."""
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    words = [*tiny.WORDS, "--jobs", jobs, "--out", str(folder), *options]
    return subprocess.Popen(
        [sys.executable, *script, *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heeds_ctrl_c,
    )


def wait_for(condition, seconds=300.0):
    """Wait until something is so."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.005)


def records_in(folder):
    """The records that a study has written."""
    return list(folder.glob("records/*.json"))


def session(leader):
    """Processes of a session that still run: the leader, its workers, and their helpers."""
    running = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, belongs = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended while we looked
            continue
        if int(belongs) == leader and state != "Z":
            running.append(int(stat.parent.name))
    return running


def kill_after(folder, more, script=TINY, options=(), *, seconds=10.0):
    """Start a study, kill it with SIGKILL after some more records, and wait for its workers."""
    before = len(records_in(folder))
    process = start(folder, script, options=options)
    try:
        wait_for(lambda: len(records_in(folder)) >= before + more or process.poll() is not None)
        workers = set(session(process.pid)) - {process.pid}
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        wait_for(lambda: not session(process.pid), seconds)
    finally:
        for orphan in session(process.pid):
            os.kill(orphan, signal.SIGKILL)
        process.communicate()  # ends when the last process that holds its pipes has
    return workers
