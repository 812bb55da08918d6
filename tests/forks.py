"""A server that forks the processes of the tests: it imports once what each of them needs."""

import multiprocessing

_PRELOADED = [
    "onsphere.monitor",
    "onsphere.optim",
    "onsphere.studies.study",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.nn.parallel",
]


def preload() -> None:
    """Tell the server what to import; it starts with the first process, and does nothing else."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
