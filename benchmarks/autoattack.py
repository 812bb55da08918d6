"""`evaluate` beside the reference AutoAttack: robust accuracy and time, on trained networks.

The reference comes with ``pip install --no-deps pyautoattack``. Both run on the same frozen
networks and images, one after the other. The time that counts is the processor's, so that other
work on the machine does not decide.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.targets import NETWORKS, Attacked
from onsphere.report import Table, table
from onsphere.robustness import Budget, Evaluation, evaluate

_COLUMNS = (
    "network", "norm", "eps", "images", "clean", "reference", "ours", "reference, s", "ours, s",
    "ratio", "wall ratio",
)  # fmt: skip


def main(words: list[str] | None = None) -> None:
    """Measure what is asked for, one line at a time, and print a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.autoattack", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="published data files")
    parser.add_argument("--only", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--norm", nargs="*", choices=["linf", "l2"], default=["linf", "l2"])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--eps", type=float, help="another radius than each network's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-reference", action="store_true", help="print our evaluation alone")
    parser.add_argument("--full", action="store_true", help="ours gives up on no example")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.only:
        attacked = NETWORKS[name](options.data_dir).first(options.images)
        for norm in options.norm:
            eps = options.eps or getattr(attacked, norm)
            if options.no_reference:
                found, *times = _timed(_ours, attacked, norm, eps, options.full)
                print(found, f"{times[1]:.0f} s, {times[0]:.0f} s of the processor", sep="\n\n")
            else:
                rows.append(_beside(attacked, norm, eps, options.full))
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    if rows:
        note = f"{options.threads} threads. Seconds of the processor; accuracies in the worst case."
        Console(width=140).print(table(Table("Beside AutoAttack", _COLUMNS, rows, note)))


def _beside(attacked: Attacked, norm: str, eps: float, full: bool) -> tuple[str | float, ...]:
    found, *ours = _timed(_ours, attacked, norm, eps, full, checks=False)
    reference, *theirs = _timed(_reference, attacked, norm, eps)
    return (
        attacked.name, norm, eps, len(attacked.x), found.clean_accuracy.value, reference,
        found.robust_accuracy.value, theirs[0], ours[0], ours[0] / theirs[0], ours[1] / theirs[1],
    )  # fmt: skip


def _ours(attacked: Attacked, norm: str, eps: float, full: bool, trust: bool = True) -> Evaluation:
    return evaluate(
        attacked.model, (attacked.x, attacked.y), eps=eps, norm=norm, checks=trust,
        budget=Budget(early_stopping=not full),
    )  # fmt: skip


def _reference(attacked: Attacked, norm: str, eps: float) -> float:
    from pyautoattack import AutoAttack

    norms = {"linf": "Linf", "l2": "L2"}
    reference = AutoAttack(attacked.model, norm=norms[norm], eps=eps, seed=0)
    _, predicted = reference.run_standard_evaluation(attacked.x, attacked.y)
    return float((predicted == attacked.y).double().mean())


def _timed(run: Callable[..., Any], *given: Any, **named: Any) -> tuple[Any, float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    result = run(*given, **named)
    return result, time.process_time() - processor, time.perf_counter() - wall


if __name__ == "__main__":
    main()
