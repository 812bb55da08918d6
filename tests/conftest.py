"""Shared settings of the tests: shape checks, deterministic property tests, doctests' precision."""

import gc
import os

import beartype  # noqa: F401 - see below
import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Shape annotations are checked in the tests only, and before the library is imported. While the
# hook runs a module, what that module is the first to import is compiled anew. Beartype is large,
# hence its import above.
_hook = install_import_hook(
    [
        "onsphere.geometry",
        "onsphere.norms",
        "onsphere.robustness",
        "onsphere.dynamics",
        "onsphere.planning.plan",
        "onsphere.planning.compare",
    ],
    "beartype.beartype",
)
_hook.__enter__()

# To look for garbage among all that is being imported takes a sixth of the time until tests begin.
gc.disable()

settings.register_profile("onsphere", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("onsphere")
torch.set_num_threads(1)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator: no test draws from the global one."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def data_dir():
    """The folder of published data files, for tests marked ``realdata``."""
    from pathlib import Path

    folder = os.environ.get("ONSPHERE_DATA")
    if folder is None:
        pytest.skip("set ONSPHERE_DATA to a folder with the published files")
    return Path(folder)


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run the command line in an empty folder; return exit code, output and error output."""
    from onsphere import cli

    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run
