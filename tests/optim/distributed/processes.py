"""Run named checks in several gloo processes at once, and tell which failed and why."""

import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import forks


def run(checks, world, folder):
    """Run ``checks`` (name -> function of a folder) in ``world`` processes, one after another.

    Returns what went wrong in any of them by name, ``""`` for nothing. After a failure the
    processes may be out of step, so the checks that follow are not run.
    """
    forks.preload()
    work = checks, world, str(folder)
    mp.start_processes(_work, args=work, nprocs=world, start_method="forkserver")
    found = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(world)]
    return {
        name: "\n".join(text for text in (mine.get(name, "not run") for mine in found) if text)
        for name in checks
    }


def _work(rank, checks, world, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    found = {}
    for name, check in checks.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # What torch says of loading without a process group, which is meant.
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                # What torch 2.9 says of its own way to write a checkpoint.
                warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
                # What is said of spheres whose vectors have one entry.
                warnings.filterwarnings("ignore", "a parameter of shape", UserWarning)
                check(Path(folder))
            found[name] = ""
        except Exception:
            found[name] = f"process {rank}:\n{traceback.format_exc()}"
            break
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    if len(found) == len(checks):
        dist.barrier()
        dist.destroy_process_group()
