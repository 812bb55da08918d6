"""Fixtures that the tests of the optimizers share."""

from pathlib import Path

import pytest

from onsphere.optim import kernels

HERE = Path(__file__).parent

# Ordinary groups alone are compared with PyTorch's here; the warning has tests of its own.
_NO_SPHERE = pytest.mark.filterwarnings("ignore:Sphere.* was given no sphere:UserWarning")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(_NO_SPHERE)


PATHS = {"native": True, "torch": False}


@pytest.fixture(params=PATHS)
def path(request):
    """Run a check on every path."""
    if PATHS[request.param] and kernels.instruction_set() == "none":
        pytest.skip("the native kernels were not built")
    with kernels.switched(PATHS[request.param]):
        yield request.param
