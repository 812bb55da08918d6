"""Weights that are spread over gloo processes move as in one process."""

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
if dist.is_available():
    from optim.distributed.processes import run
    from optim.distributed.shards import CHECKS
else:
    CHECKS = {}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    return run(CHECKS, request.param, tmp_path_factory.mktemp(f"of{request.param}"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_several_processes(found, name):
    assert not found[name], found[name]
