"""How long an audit takes: `python -m benchmarks.audit_time [NAME ...]` prints a table.

With certificates: networks of torchvision and timm at random weights, GPT-2 small, a small MLP.
Without memory: decoders of 7 and 70 billion weights, by their configuration. Every audit runs in
a process of its own, whose peak memory stands beside the time; imports are not counted.

`python -m benchmarks.audit_time --timm [NAME ...]` audits a network of each module of timm without
memory, on one core and in one process.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.atlas.timm_networks import LARGER, NETWORKS

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
REPEATS = 3
MOST = 3.0
"""Seconds of one core that a network of timm is to take without memory."""


def mlp() -> Built:
    widths = (20, 64, 64, 64)
    hidden = [
        layer
        for a, b in pairwise(widths)
        for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())
    ]
    return nn.Sequential(*hidden, nn.Linear(64, 10)), (torch.randn(8, 20),), {}


def of_torchvision(name: str, side: int) -> Built:
    import torchvision

    return getattr(torchvision.models, name)(), (torch.randn(2, 3, side, side),), {}


def of_timm(name: str, batch: int) -> Built:
    import timm

    return timm.create_model(name), (torch.randn(batch, 3, 224, 224),), {}


def gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config()), (), {"input_ids": torch.randint(0, 1000, (1, 16))}


def llama(**sizes: Any) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        ids = torch.zeros(1, 8, dtype=torch.long)
    return model, (), {"input_ids": ids}


MODELS: Mapping[str, tuple[Callable[[], Built], str]] = {
    "mlp": (mlp, "0.3 s"),
    "resnet18": (lambda: of_torchvision("resnet18", 64), "4 s"),
    "resnet50": (lambda: of_torchvision("resnet50", 64), "8 s"),
    "mobilenet_v3_small": (lambda: of_torchvision("mobilenet_v3_small", 64), "4 s"),
    "vit_tiny": (lambda: of_timm("vit_tiny_patch16_224", 1), "4 s"),
    "convnext_atto": (lambda: of_timm("convnext_atto", 1), "4 s"),
    "gpt2": (gpt2, "25 s, 5 GB"),
    "llama-7b": (llama, "5 s"),
    "llama-70b": (
        lambda: llama(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
            num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
        ),
        "15 s, 2 GB",
    ),
}  # fmt: skip
"""Name -> how to build it with its inputs, and what is wanted; the last two without memory."""


def measured(name: str) -> tuple[float, float, float]:
    """Audit a model; return seconds by the clock, seconds of processors, and gigabytes."""
    from onsphere import audit  # imported here, so that this is not counted

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, args, kwargs = MODELS[name][0]()
    start, used = time.perf_counter(), time.process_time()
    audit(model, args, kwargs)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    return seconds, used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def of_every_module(names: Sequence[str]) -> None:
    """Print the seconds of processors that networks of timm take without memory."""
    from onsphere import audit
    from onsphere.models.load import load

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| network | seconds of one core |\n|---|---|")
    seconds = []
    for name in names:
        try:
            target = load(f"timm:{name}", size="full")
            start = time.process_time()
            audit(target.model, target.args, target.kwargs, output=target.output)
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0]} |", flush=True)
            continue
        seconds.append(time.process_time() - start)
        print(f"| {name} | {seconds[-1]:.1f} |", flush=True)
    print(f"\n{sum(s < MOST for s in seconds)} of {len(names)} under {MOST:.0f} s, "
          f"{sum(seconds):.0f} s in all")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--timm", action="store_true", help="every module of timm, without memory")
    chosen = parser.parse_args()
    if chosen.timm:
        of_every_module(chosen.names or (*NETWORKS, *LARGER))
        return
    unknown = set(chosen.names) - set(MODELS)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}, medians of "
          f"{chosen.repeats}\n")  # fmt: skip
    print("| model | seconds | of processors | GB at the peak | wanted |")
    print("|" + "---|" * 5)
    fresh = multiprocessing.get_context("spawn")
    for name in chosen.names or MODELS:
        runs = []
        for _ in range(chosen.repeats):
            with fresh.Pool(1) as pool:
                runs.append(pool.apply(measured, (name,)))
        seconds, used, peak = (statistics.median(x) for x in zip(*runs, strict=True))
        print(f"| {name} | {seconds:.1f} | {used:.1f} | {peak:.1f} | {MODELS[name][1]} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
