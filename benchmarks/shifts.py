"""Judge families of shifts: `python -m benchmarks.shifts WHAT` prints tables of docs/results.

WHAT is families (tiny models of `transformers`: every family is put to the test at random weights)
or random networks of the tests: random (plain pieces), written or mixed (code as people write it).
There all weights are moved along all families at once, and the dimension that is claimed of vectors
is compared with the null space of derivatives by differences.
"""

import argparse
import importlib
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.families import FAMILIES, Family
from onsphere._torch.execution import call, float_outputs, plain_execution, weights
from onsphere.symmetry.exact.trace import Call, Tracing
from onsphere.symmetry.numeric.probe import Probe
from onsphere.symmetry.numeric.samples import samples
from onsphere.symmetry.search.reach import followed
from onsphere.symmetry.shifts.amounts import Amounts, learn
from onsphere.symmetry.shifts.certificate import certified
from onsphere.symmetry.shifts.families import Found, followed_shifts, shift_families
from onsphere.symmetry.shifts.solution import Solution

RANDOM = {
    "random": ("networks", "plain_case"),
    "written": ("written", "written_case"),
    "mixed": ("mixed", "mixed_case"),
}
STEP, HOLDS = 1e-5, 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("families", *RANDOM))
    parser.add_argument("--count", type=int, default=100, help="how many random networks")
    parser.add_argument("--first", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families to measure")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    if chosen.what == "families":
        print("| family | shift families | dimension | refuted | largest change | s |")
        print("|---|---|---|---|---|---|")
        for family in FAMILIES:
            if not chosen.only or family.name in chosen.only:
                print(_row(family), flush=True)
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    module, name = RANDOM[chosen.what]
    make = getattr(importlib.import_module(f"symmetry.{module}"), name)
    total: Counter[str] = Counter()
    for seed in range(chosen.first, chosen.first + chosen.count):
        total += _judged(make(seed))
    print(", ".join(f"{total[k]} {k}" for k in (
        "networks", "families", "refuted", "exact", "fewer than numbers", "more than numbers",
        "unclear",
    )))  # fmt: skip


def _row(family: Family) -> str:
    model, kwargs = family.build()
    tracing = Tracing(model, (), kwargs, output=family.output)
    probe = Probe(model, (), kwargs, tracing.trace(), output=family.output)
    probe.traced, others = followed(probe, tracing, (), kwargs)
    start = time.process_time()
    solution, found = followed_shifts(
        model, (), kwargs, output=family.output, others=others, kept=probe.traced.kept
    )
    seconds = time.process_time() - start
    held = certified(probe, solution, found, samples(probe).random)
    change = max((f.change or 0.0 for f in held), default=0.0)
    dimension = sum(f.dimension for f in held)
    return (
        f"| {family.name} | {len(held)} | {dimension} | {len(found) - len(held)} | "
        f"{change:.0e} | {seconds:.2f} |"
    )


def _judged(case: Any) -> Counter[str]:
    """Count what is said of one network, and what numbers say of it."""
    if case.rough:
        return Counter()
    net: nn.Module = case.net
    others = [Call(x, {}) for x in case.rich]
    solution, found = followed_shifts(net, case.args, {}, others=others)
    state = {n: t.detach().clone() for n, t in [*net.named_parameters(), *net.named_buffers()]}
    counted = Counter(networks=1, families=len(found))
    if found and not _change(case, state, solution, found) < HOLDS and not _is_rough(case, state):
        counted["refuted"] = sum(not _change(case, state, solution, [f]) < HOLDS for f in found)
    parameters = dict(net.named_parameters())
    vectors = [n for n, t in state.items() if t.ndim == 1 and n in parameters]
    fixed = [n for n in state if n not in vectors]
    moving = shift_families(net, case.args, {}, others=others, held=fixed)
    claimed = sum(f.dimension for f in moving)
    null = _null_space(case, state, vectors)
    if null is None:
        counted["unclear"] = 1
    else:
        order = (claimed > null) - (claimed < null)
        counted[("fewer than numbers", "exact", "more than numbers")[order + 1]] = 1
    return counted


def _is_rough(case: Any, state: Mapping[str, Tensor]) -> bool:
    """Return whether rounding the weights alone changes the outputs."""
    near = {n: t * (1 + 1e-12) if t.is_floating_point() else t for n, t in state.items()}
    before, after = (_outputs(case.net, s, case.inputs) for s in (state, near))
    kept = before.isfinite()
    return float((after - before)[kept].abs().max()) > 1e-4 * float(before[kept].abs().max())


def _change(
    case: Any, state: Mapping[str, Tensor], solution: Solution, found: Sequence[Found]
) -> float:
    """Return the relative change of the outputs when weights move along some families."""
    net: nn.Module = case.net
    labels = np.concatenate([f.labels for f in found])
    amounts = Amounts(solution, labels, torch.Generator().manual_seed(0))
    parameters, persistent = weights(net)
    own = {n: state[n] for n in parameters}
    buffers = {n: state[n] for n, _ in net.named_buffers()}
    learn(amounts, lambda: _outputs(net, state, [case.args]), own, buffers, persistent)
    added = amounts.added()
    moved = {n: t + added[n].to(t) if n in added else t for n, t in state.items()}
    before, after = (_outputs(net, s, case.inputs) for s in (state, moved))
    kept = before.isfinite()
    if not kept.any():
        return 0.0
    return float((after - before)[kept].abs().max() / before[kept].abs().max().clamp_min(1e-300))


def _null_space(case: Any, state: Mapping[str, Tensor], vectors: Sequence[str]) -> int | None:
    """Return its dimension by differences; ``None`` where the rank is not clear."""
    columns = []
    for name in vectors:
        for k in range(state[name].numel()):
            step = torch.zeros_like(state[name])
            step[k] = STEP
            above, below = (
                _outputs(case.net, {**state, name: state[name] + sign * step}, case.inputs)
                for sign in (1, -1)
            )
            columns.append((above - below) / (2 * STEP))
    if not columns:
        return 0
    jacobian = torch.stack(columns, 1)
    jacobian = jacobian[jacobian.isfinite().all(1)]
    values = torch.linalg.svdvals(jacobian)
    if not len(values) or not values[0]:
        return len(columns)
    ranks = {int((values > t * values[0]).sum()) for t in (1e-7, 3e-9)}
    return len(columns) - ranks.pop() if len(ranks) == 1 else None


@torch.no_grad()
def _outputs(net: nn.Module, state: Mapping[str, Tensor], inputs: Sequence[Any]) -> Tensor:
    found = []
    parameters = dict(net.named_parameters())
    for x in inputs:
        held = {n: t if n in parameters else t.clone() for n, t in state.items()}
        with plain_execution(7):
            found += [t.reshape(-1).double() for t in float_outputs(call(net, held, x, {}))]
    return torch.cat(found)


if __name__ == "__main__":
    main()
