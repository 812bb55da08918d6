"""Fixtures that the tests of the optimizers share."""

import pytest

from onsphere.optim import kernels

PATHS = {"native": True, "torch": False}


@pytest.fixture(params=PATHS)
def path(request):
    """Run a check on every path."""
    if PATHS[request.param] and kernels.instruction_set() == "none":
        pytest.skip("the native kernels were not built")
    with kernels.switched(PATHS[request.param]):
        yield request.param
