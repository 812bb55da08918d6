"""Fixtures that the tests of the optimizers share."""

import pytest

from onsphere.optim import native

PATHS = {"native": True, "torch": False}


@pytest.fixture(params=PATHS)
def path(request):
    """Run a check on every path."""
    if PATHS[request.param] and native.instruction_set() == "none":
        pytest.skip("the native kernels were not built")
    with native.switched(PATHS[request.param]):
        yield request.param
