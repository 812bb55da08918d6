"""Checks that run in several processes: a monitor of shards sees what one of whole weights sees."""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from monitor.networks import Weights
from onsphere.geometry import Sphere, VectorAxes
from onsphere.monitor import Monitor

SHAPES = {"rows": (7, 4), "whole": (6, 4), "heads": (8, 3), "tall": (1, 5)}
AXES = {
    "rows": VectorAxes((0,)),
    "whole": VectorAxes(),
    "heads": VectorAxes(pieces=((0, 2),)),
    "tall": VectorAxes((1,)),
}


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}


def runs(placements, folder, mesh):
    """The same steps on whole weights and on shards; returns both monitors, and what was sent."""
    plain = Weights(**tensors(0))
    cut = Weights(**{n: torch.empty(0) for n in SHAPES})
    for name, value in tensors(0).items():
        shard = distribute_tensor(value, mesh, placements, src_data_rank=None)
        setattr(cut, name, nn.Parameter(shard))
    monitors, sent = [], []
    for net in (plain, cut):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        spheres = {(getattr(net, n),): Sphere(axes) for n, axes in AXES.items()}
        path = folder / f"{placements}.jsonl" if net is cut else None
        monitor = Monitor(net, optimizer, spheres, every=1, path=path)
        for step in (1, 2, 3):
            for name, g in tensors(step).items():
                if net is cut:
                    g = distribute_tensor(g, mesh, placements, src_data_rank=None)
                getattr(net, name).grad = g
            with CommDebugMode() as mode:
                optimizer.step()
            sent.append(mode.get_total_counts())
        monitor.close()
        monitors.append(monitor)
    return *monitors, sent[3:]


def the_same_numbers(folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placements in ([Shard(0)], [Shard(1)], [Replicate()]):
        whole, shards, sent = runs(placements, folder, mesh)
        for ours, theirs in zip(whole.run.samples, shards.run.samples, strict=True):
            for field in ("values", "counts", "predicted"):
                a, b = getattr(ours, field), getattr(theirs, field)
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=str(placements))
        dist.barrier()
        text = (folder / f"{placements}.jsonl").read_text()
        assert text.count("onsphere-run") == 1, "one process writes"
        assert sent == [0 if placements == [Replicate()] else 1] * 3, (placements, sent)


CHECKS = {"the same numbers": the_same_numbers}
