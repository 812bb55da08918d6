"""A monitor of weights that are sharded over two processes."""

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes(tmp_path):
    from monitor.shards import CHECKS
    from optim.distributed.processes import run

    found = run(CHECKS, 2, tmp_path)
    assert found == dict.fromkeys(CHECKS, "")
