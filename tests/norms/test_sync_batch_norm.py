"""SyncBatchNorm over two processes."""

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes(tmp_path):
    from norms.synchronized import CHECKS
    from optim.distributed.processes import run

    assert run(CHECKS, 2, tmp_path) == dict.fromkeys(CHECKS, "")
