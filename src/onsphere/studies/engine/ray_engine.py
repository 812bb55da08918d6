"""Cells as tasks of a Ray cluster: on several machines, with retries where a worker dies.

The process that runs the study keeps every record; workers get all they need in the task, so they
share no disk with it. They need the same versions of onsphere and PyTorch. Ray itself is imported
when the first cell is submitted.
"""

import logging
import os
import secrets
import socket
import subprocess
import sys
from concurrent.futures import Future
from functools import lru_cache
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from onsphere.errors import OnsphereError
from onsphere.studies.engine.local import check_jobs
from onsphere.studies.engine.work import Product, Work, compute, forwarded, prepare
from onsphere.studies.setup.data import Images, Source
from onsphere.version import __version__

if TYPE_CHECKING:
    import ray

RETRIES = 3
"""How often a cell is computed again whose worker died."""

SECONDS_TO_ANSWER = 10
"""How long a cluster may take to answer, before the study is refused."""

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}

_SECONDS_OF_A_PROBE = 60.0

# The time runs from when Ray is imported, which on a busy machine takes long. An alarm ends the
# process whatever Ray waits for.
_PROBE = """
import logging, signal, sys, ray
if hasattr(signal, "alarm"):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(sys.argv[2]))
try:
    ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
except Exception as error:
    print(" ".join(str(error).split()))
    sys.exit(1)
"""


class RayEngine:
    """Tasks of a Ray cluster, each on one core with one thread.

    Args:
        address: ``HOST:PORT`` of a running cluster that this machine belongs to, ``"auto"`` to
            find it, ``"local"`` to start Ray on this machine alone; ``$RAY_ADDRESS`` or
            ``"local"`` unless given. A script that has called ``ray.init`` keeps its cluster.
        jobs: how many cells at a time; as many as the cluster has cores unless given.

    Raises:
        OnsphereError: Ray is not installed, or fewer than one job.
    """

    def __init__(self, address: str | None = None, jobs: int | None = None) -> None:
        if jobs is not None:
            check_jobs(jobs)
        if find_spec("ray") is None:
            raise OnsphereError('--engine ray needs Ray: pip install "onsphere[ray]"')
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self.most = jobs or sys.maxsize  # Ray has a queue of its own
        self._jobs = jobs
        self._owned = False
        self._task: Any = None
        self._images: tuple[Source, ray.ObjectRef] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._owned:
            import ray

            ray.shutdown()

    def submit(self, work: Work, source: Source) -> Future[Product]:
        """Begin to compute a cell; the first one connects to the cluster.

        Raises:
            OnsphereError: the cluster does not answer.
        """
        ray = self._connected()
        if self._images is None or self._images[0] != source:
            self._images = source, ray.put(source.load())
        if self._task is None:
            self._task = ray.remote(num_cpus=1, max_retries=RETRIES)(_compute)
        # In a list, for Ray to hand over the reference: a process reads the images once.
        reference = self._task.remote(work, [self._images[1]], _versions())
        return forwarded(reference.future(), _told)

    def _connected(self) -> Any:
        """Return the module, connected."""
        local = self.address == "local"
        _set_environment(local)
        import ray

        if ray.is_initialized():
            return ray
        self._owned = True
        if not local:
            _check_answer(self.address)
        options = {"num_cpus": self._jobs, "include_dashboard": False} if local else {}
        try:
            ray.init(self.address, **options, **_QUIET)
        except Exception as error:
            said = " ".join(str(error).split())
            raise OnsphereError(f"Ray did not start at {self.address!r}: {said[:300]}") from error
        return ray


def _compute(work: Work, images: list["ray.ObjectRef"], versions: tuple[str, str]) -> Product:
    """Compute a cell in a worker."""
    _check_versions(versions)
    _prepared()
    return compute(work, lambda: _fetched(images[0]))


def _check_versions(versions: tuple[str, str]) -> None:
    """Refuse to compute under another version than the record will say."""
    here = _versions()
    if here != versions:
        import platform

        raise OnsphereError(
            f"{platform.node()} has onsphere {here[0]} and torch {here[1]}, this study runs with "
            f"onsphere {versions[0]} and torch {versions[1]}: install the same on every machine"
        )


def _versions() -> tuple[str, str]:
    return __version__, str(torch.__version__)


@lru_cache(maxsize=1)
def _prepared() -> None:
    prepare()


@lru_cache(maxsize=1)
def _fetched(images: "ray.ObjectRef") -> Images:
    import ray

    found: Images = ray.get(images)
    return found


def _set_environment(local: bool) -> None:
    """Say what Ray reads while it is imported."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to its makers
    # Without it, a cell that needs more memory than there is would be tried for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    if local and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # Its ports are open to the network, and whoever reaches them may run code.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _check_answer(address: str) -> None:
    """Ask a cluster in another process first: in this one, Ray would ask for minutes.

    Raises:
        OnsphereError: no answer in time, or Ray's own words if it refuses.
    """
    _check_port(address)
    command = [sys.executable, "-c", _PROBE, address, str(SECONDS_TO_ANSWER)]
    late = _no_answer(address, f"nothing within {SECONDS_TO_ANSWER} seconds")
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS_OF_A_PROBE, check=False
        )
    except subprocess.TimeoutExpired:
        raise late from None
    if asked.returncode < 0:  # the alarm
        raise late
    if asked.returncode != 0:
        raise _no_answer(address, asked.stdout.strip() or "it ended without a word")


def _check_port(address: str) -> None:
    """Tell a mistyped address at once."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return  # Ray knows better what it is
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(address, str(error)) from None


def _no_answer(address: str, said: str) -> OnsphereError:
    return OnsphereError(
        f"no Ray cluster answers at {address!r} ({said}); start one with `ray start --head`, and "
        "run the study on one of its machines"
    )


def _told(error: BaseException) -> BaseException:
    """Turn Ray's errors into the task's own, or into what the user can do."""
    from ray import exceptions as of_ray

    if isinstance(error, of_ray.RayTaskError):
        return _raised_by(error.cause)
    lost = (of_ray.WorkerCrashedError, of_ray.NodeDiedError, of_ray.OutOfMemoryError)
    if isinstance(error, lost):
        return OnsphereError(
            f"Ray lost a cell {RETRIES + 1} times ({type(error).__name__}; out of memory?); what "
            "had finished is kept: run the same command again, with fewer --jobs if it was memory"
        )
    if isinstance(error, of_ray.RayError):
        said = " ".join(str(error).split())[:300]
        return OnsphereError(f"Ray could not compute a cell ({type(error).__name__}: {said})")
    return error


def _raised_by(cause: BaseException) -> BaseException:
    """Return what a task raised, or why a worker could not begin it."""
    said = str(cause).strip()
    if said.startswith("The remote function failed to import on the worker"):
        return OnsphereError(
            f"a worker of the Ray cluster cannot import onsphere ({said.splitlines()[-1]}); "
            'on every machine: pip install "onsphere[ray,study]"'
        )
    return cause
