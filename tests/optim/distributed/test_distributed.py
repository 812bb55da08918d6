"""Weights that are spread over gloo processes move as in one process."""

import pytest
import torch.distributed as dist


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_in_several_processes(world, tmp_path):
    """One test of all checks: two workers of the suite would each start processes of their own."""
    from optim.distributed.processes import run
    from optim.distributed.shards import CHECKS

    found = run(CHECKS, world, tmp_path)
    assert not any(found.values()), "\n".join(f"{name}: {text}" for name, text in found.items())
