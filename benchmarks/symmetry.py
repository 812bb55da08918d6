"""Measure the audit: `python -m benchmarks.symmetry WHAT` prints tables of docs/results.

WHAT is families, canonical, fixed, gpt2, or random networks that the oracle of the tests judges:
random (plain pieces), written or mixed (code as people write it), channels (plain pieces, judged by
row, column and channel). `families` needs `transformers`; nothing is downloaded, so gpt2 has its
architecture and random weights unless a checkpoint is given. `python -m benchmarks.audit_time`
measures how long audits take.
"""

import argparse
import importlib
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.atlas.timm_networks import LARGER, NETWORKS
from benchmarks.families import FAMILIES, Family
from onsphere._torch.execution import OutputPicker, float_outputs
from onsphere.models.checkpoint import load as load_weights
from onsphere.models.checkpoint import read
from onsphere.models.load import load
from onsphere.symmetry import Audit, CanonicalizeError, FixedScales, audit, canonicalize
from onsphere.symmetry.exact.trace import trace
from onsphere.symmetry.numeric.certificate import (
    is_well_conditioned,
    relative_change,
    rounding_floor,
)
from onsphere.symmetry.numeric.probe import Point, Probe
from onsphere.symmetry.numeric.radial_derivatives import RadialRows, join, radial_rows
from onsphere.symmetry.rewrite.canonicalize import Factors
from onsphere.symmetry.rewrite.rescale import moved_to_norms, octaves_of

BatchNorm = nn.modules.batchnorm._BatchNorm
RANDOM = {
    "random": ("networks", "plain_case"),
    "written": ("written", "written_case"),
    "mixed": ("mixed", "mixed_case"),
    "channels": ("networks", "plain_case"),
}
"""Networks -> module of the tests and the function there that makes them from a seed."""
WHAT = ("families", "canonical", "fixed", "gpt2", *RANDOM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--checkpoint", help="safetensors weights of GPT-2 small")
    parser.add_argument("--count", type=int, default=5000, help="how many random networks")
    parser.add_argument("--first", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families to measure")
    parser.add_argument("--timm", action="store_true", help="a network of each module of timm")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    {
        "families": lambda: families(chosen.only),
        "canonical": lambda: canonical(chosen.only),
        "fixed": lambda: (fixed_of_timm if chosen.timm else fixed)(chosen.only),
        "gpt2": lambda: gpt2(chosen.checkpoint),
        **dict.fromkeys(RANDOM, lambda: judged(chosen.what, chosen.first, chosen.count)),
    }[chosen.what]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{chosen.what}: {time.monotonic() - start:.1f} s, {peak:.2f} GiB at the peak")


def families(only: Sequence[str] | None) -> None:
    """Audit every family."""
    print("| family | design | mode | parameters | scale symmetries | by rank | spheres | trades "
          "| inert | shifts | parts | unknown ops | residual | largest leak | s |")  # fmt: skip
    print("|" + "---|" * 15)
    each_family(only, audited)


def canonical(only: Sequence[str] | None) -> None:
    """Canonicalize every family in both precisions, per tensor, and with powers of two."""
    print("| family | mode | change, float64 | change, float32 | change, powers of two "
          "| norm before | per tensor | per channel | powers of two | twice is once | s |"
    )  # fmt: skip
    print("|" + "---|" * 11)
    each_family(only, canonicalized)


def fixed(only: Sequence[str] | None) -> None:
    """Choose weights whose norms are held, and move these norms by random factors."""
    print("| family | mode | parameters | scale symmetries | held | left | change | s "
          "| by channel | vectors held | weights | left | change | s |")  # fmt: skip
    print("|" + "---|" * 14)
    each_family(only, fixed_on)


def fixed_on(family: Family, train: bool) -> str:
    model, kwargs = family.build()
    found = audit(model.train(train), (), kwargs, output=family.output, search_seconds=0)
    start = time.monotonic()
    chosen = found.fixed_scales(model)
    seconds = time.monotonic() - start
    start = time.monotonic()
    finer = found.fixed_scales(model, granularity="vector")
    longer = time.monotonic() - start
    probe = Probe(model, (), kwargs, trace(model, (), kwargs, output=family.output),
                  output=family.output)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    octaves = random_norms(found, chosen, generator)
    changes, finely = [], []
    for point in points(probe):
        moved = probe.rescaled(point, octaves, base=2.0)
        changes.append(relative_change(probe.baseline(point), probe.outputs(moved)))
        moved = with_vectors(probe, point, finer, generator)
        finely.append(relative_change(probe.baseline(point), probe.outputs(moved)))
    return (f"| {family.name} | {found.mode} | {len(found.parameters)} "
            f"| {chosen.removed + chosen.left} | {len(chosen.held)} | {chosen.left} "
            f"| {max(changes):.0e} | {seconds:.2f} "
            f"| {finer.removed + finer.left} | {finer.removed} | {len(finer.held)} | {finer.left} "
            f"| {max(finely):.0e} | {longer:.2f} |")  # fmt: skip


def fixed_of_timm(only: Sequence[str] | None) -> None:
    """Do the same with whole weights of timm's networks, in training mode where norms are held.

    What to hold is chosen without memory, and tried with it on images of the same size: zeros that
    pad an odd size may take a symmetry away. Rounding stands beside the change: what it alone makes
    of it in a deep network with batch statistics.
    """
    print("| network | parameters | scale symmetries | held | left | single numbers among these "
          "| change | rounding |\n|" + "---|" * 8)  # fmt: skip
    good = total = 0
    for name in only or (*NETWORKS, *LARGER):
        total += 1
        try:
            target = load(f"timm:{name}", size="full", train=True)
            found = audit(target.model, target.args, target.kwargs, output=target.output)
            chosen = found.fixed_scales(target.model)
            change, rounding = change_by_norms(name, found, chosen)
        except Exception as error:
            print(f"| {name} | failed: {type(error).__name__}: {error} |", flush=True)
            continue
        single = of_single_numbers(found)
        good += chosen.left == single and change <= max(1e-12, 1e3 * rounding)
        print(f"| {name} | {len(found.parameters)} | {chosen.removed + chosen.left} "
              f"| {len(chosen.held)} | {chosen.left} | {single} | {change:.0e} | {rounding:.0e} |",
              flush=True)  # fmt: skip
    print(f"\n{good} of {total}: nothing left but single numbers, and the same function")


def of_single_numbers(found: Audit) -> int:
    """Return the dimension of symmetries that move single numbers alone, which are never held."""
    names = [n for n, shape in found.parameters.items() if math.prod(shape) > 1]
    acting = found.parameters.keys() - {*found.inert}
    some = [v for v in found.scale_symmetries if set(v) <= acting]
    if not some:
        return 0
    rows = [[float(v.get(n, 0)) for n in names] for v in some]
    return len(some) - int(torch.linalg.matrix_rank(torch.tensor(rows, dtype=torch.float64)))


def change_by_norms(name: str, found: Audit, chosen: FixedScales) -> tuple[float, float]:
    """Move all norms that are held by random factors; return how far the output changes.

    Beside it the change that rounding of the weights makes where that is largest.
    """
    target = load(f"timm:{name}", size="real", train=True)
    traced = trace(target.model, target.args, target.kwargs, output=target.output)
    probe = Probe(target.model, target.args, target.kwargs, traced, output=target.output)
    octaves = random_norms(found, chosen, torch.Generator().manual_seed(0))
    changes, floors = [], []
    for point in points(probe, as_given=True):
        moved = probe.rescaled(point, octaves, base=2.0)
        changes.append(relative_change(probe.baseline(point), probe.outputs(moved)))
        floors.append(rounding_floor(probe, point))
    return max(changes), max(floors)


def random_norms(
    found: Audit, chosen: FixedScales, generator: torch.Generator
) -> Mapping[str, float]:
    """Return by how many octaves all weights move where the norms that are held do at random."""
    factors = {n: 2.0 ** float(torch.randn((), generator=generator)) for n in chosen.held}
    return octaves_of(found, factors)


def points(probe: Probe, *, as_given: bool = False) -> Iterator[Point]:
    """Yield the model's own weights and two random ones, where asked with inputs as given."""
    turns = range(probe.others.turns - 1, 99, probe.others.turns) if as_given else range(9)
    drawn = (probe.redrawn(0.4, 1.0, turn) for turn in turns)
    random = islice((point for point in drawn if is_well_conditioned(probe, point)), 2)
    return chain((probe.given(),), random)


def with_vectors(
    probe: Probe, point: Point, chosen: FixedScales, generator: torch.Generator
) -> Point:
    """Move the norms of all vectors that are held by random factors, along the symmetries."""
    state = {n: point.state[own] for n, own in probe.own_name.items()}
    norms = {}
    for name, axes in chosen.held.items():
        have = axes.norms(state[name]).flatten()
        norms[name] = have * 2.0 ** torch.randn(have.shape, generator=generator).double()
    moved = moved_to_norms(state, chosen.order, norms)
    worst = max(
        (float((axes.norms(moved[n]).flatten() / norms[n] - 1).abs().max())
         for n, axes in chosen.held.items()), default=0.0,
    )  # fmt: skip
    if worst > 1e-12:
        raise ArithmeticError(f"norms are missed by {worst:.0e}")
    return replace(point, state={**point.state, **{probe.own_name[n]: t for n, t in moved.items()}})


def each_family(only: Sequence[str] | None, row: Callable[[Family, bool], str]) -> None:
    """Print a row per family and mode; one that fails says so and stops nothing."""
    known = {f.name for f in FAMILIES}
    if only and not known.issuperset(only):
        raise SystemExit(f"no such family: {set(only) - known}; there are {sorted(known)}")
    for family in FAMILIES:
        if only and family.name not in only:
            continue
        for train in (False, True) if "BatchNorm" in family.design else (False,):
            try:
                print(row(family, train), flush=True)
            except Exception as error:
                print(f"| {family.name} | failed: {type(error).__name__}: {error} |", flush=True)


def audited(family: Family, train: bool) -> str:
    model, kwargs = family.build()
    start = time.monotonic()
    found = audit(model.train(train), (), kwargs, output=family.output)
    seconds = time.monotonic() - start
    claims = [*found.spheres, *found.rescalings]
    residual = max((c.residual or 0.0 for c in claims), default=0.0)
    leak = max((x.amount for x in found.leaks), default=0.0)
    return (f"| {family.name} | {family.design} | {found.mode} | {len(found.parameters)} "
            f"| {len(found.scale_symmetries)} | {numeric_dimension(model, kwargs, family.output)} "
            f"| {len(found.spheres)} | {len(found.rescalings)} | {len(found.inert)} "
            f"| {len(found.shifts)} | {len(found.parts)} | {len(found.unknown_ops)} "
            f"| {residual:.0e} | {leak:.0e} | {seconds:.1f} |")  # fmt: skip


def numeric_dimension(model: nn.Module, kwargs: dict[str, Any], output: OutputPicker) -> int:
    """Count scale symmetries by the rank of radial derivatives at random weights, without units.

    The model runs in float64 with eps near 0, as for certificates.
    """
    probe = Probe(model, (), kwargs, trace(model, (), kwargs, output=output), output=output, seed=1)
    own = torch.tensor([n in probe.traced.parameters for n in probe.names])
    rows: list[RadialRows] = []
    before, found, wanted = -1, -2, len(probe.names) + 4
    while before != found:  # until twice as many rows tell the same
        _measure(probe, rows, wanted)
        joined = join(rows)
        # Directions of the buffers alone are no symmetry of the parameters.
        null = scaled_null_space(joined.values, joined.bounds)[:, own]
        before = found
        found = int(torch.linalg.matrix_rank(null, rtol=1e-6)) if null.numel() else 0
        wanted *= 2
    return found


def _measure(probe: Probe, rows: list[RadialRows], wanted: int) -> None:
    """Add rows until there are as many as wanted."""
    while sum(len(r.values) for r in rows) < wanted:
        for size in (1.0, 0.5, 0.25):
            point = calibrated(probe.model, probe.redrawn(0.3, size))
            if is_well_conditioned(probe, point) or len(rows) > 30:
                # More combinations than there are outputs say nothing new.
                outputs = sum(t.numel() for t in probe.baseline(point))
                rows.append(radial_rows(probe, point, min(outputs, max(4, wanted // 9))))


def calibrated(model: nn.Module, point: Point) -> Point:
    """Set running statistics to what the weights make of the inputs.

    With random ones the signal dies in a deep network: activations saturate, and radial derivatives
    of the first layers sink below rounding.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_var is not None]
    if model.training or not norms:
        return point
    copy = deepcopy(model).double().train()
    copy.load_state_dict({**copy.state_dict(), **point.state})
    for module in copy.modules():
        if isinstance(module, BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the plain mean of all batches
    with torch.no_grad():
        copy(*point.args, **point.kwargs)
    statistics = {n: t for n, t in copy.named_buffers() if n.endswith(("mean", "var"))}
    noise = torch.Generator().manual_seed(len(statistics))
    shaken = {
        n: t * (1 + 0.1 * torch.rand(t.shape, generator=noise, dtype=t.dtype)) + 1e-3
        for n, t in statistics.items()
    }
    return replace(point, state={**point.state, **shaken})


def scaled_null_space(values: Tensor, bounds: Tensor) -> Tensor:
    """Null vectors, one per row: every weight in units of what its derivative could be at most.

    The rank lies at the widest gap between singular values, with rounding well below it.
    """
    largest = bounds.amax(1, keepdim=True).clamp_min(1e-300)
    values, bounds = values / largest, bounds / largest
    scale = bounds.amax(0)
    scale = torch.where(scale > 1e-9, scale, 1.0)  # less than that is rounding of 0
    _, s, vh = torch.linalg.svd(values / scale, full_matrices=True)
    padded = torch.cat([s[:1], s, s.new_zeros(1)]).clamp_min(1e-17 * s.max().clamp_min(1e-300))
    ratios = torch.where(padded[:-1] > 1e-11 * padded[0], padded[:-1] / padded[1:], 0.0)
    rank = int(ratios.argmax()) if float(s.max()) > 1e-9 else 0
    return vh[rank:]


def of_tests(module: str) -> Any:
    """Return a module of the tests of the audit."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    return importlib.import_module(f"symmetry.{module}")


@dataclass(frozen=True)
class Canonical:
    """What canonicalizing did, as a user measures it."""

    change: str
    norms: tuple[float, float]
    final: bool
    seconds: float


def canonicalized(family: Family, train: bool) -> str:
    model, kwargs = family.build()
    found = audit(model.train(train), (), kwargs, output=family.output)
    wide = measured(family, train, found, torch.float64, "auto")
    narrow = measured(family, train, found, torch.float32, "auto")
    tensors = measured(family, train, found, torch.float32, "auto", channels=False)
    binary = measured(family, train, found, torch.float32, "binary")
    every = (wide, narrow, tensors, binary)
    final = all(x.final for x in every)
    grew = any(x.norms[1] > x.norms[0] * (1 + 1e-12) for x in every)
    grew |= narrow.norms[1] > tensors.norms[1] * (1 + 1e-7)  # which is rounding in float32
    return (f"| {family.name} | {found.mode} | {wide.change} | {narrow.change} | {binary.change} "
            f"| {narrow.norms[0]:.2f} | {tensors.norms[1]:.2f} "
            f"| {narrow.norms[1]:.2f}{' GREW' if grew else ''} "
            f"| {binary.norms[1]:.2f} | {'yes' if final else 'NO'} "
            f"| {wide.seconds:.1f} |")  # fmt: skip


def measured(
    family: Family,
    train: bool,
    found: Audit,
    dtype: torch.dtype,
    factors: Factors,
    channels: bool = True,
) -> Canonical:
    model, kwargs = family.build()
    model = model.to(dtype).train(train)
    kwargs = {k: _cast(v, dtype) for k, v in kwargs.items()}
    canonical = partial(
        canonicalize, audit=found, args=(), kwargs=kwargs, output=family.output, factors=factors,
        channels=channels,
    )  # fmt: skip
    start = time.process_time()
    try:
        once = canonical(model)
    except CanonicalizeError as error:
        return Canonical(f"refused: {error}", (total_norm(model),) * 2, False, 0.0)
    seconds = time.process_time() - start
    again = canonical(once)
    pairs = zip(once.state_dict().values(), again.state_dict().values(), strict=True)
    final = all(torch.equal(p, q) for p, q in pairs)
    norms = total_norm(model), total_norm(once)
    with torch.no_grad():
        torch.manual_seed(0)
        before = [t.clone() for t in float_outputs(model(**kwargs), family.output)]
        torch.manual_seed(0)
        after = float_outputs(once(**kwargs), family.output)
    change = relative_change(before, after)
    return Canonical(f"{change:.0e}" if change else "0", norms, final, seconds)


def total_norm(model: nn.Module) -> float:
    return sum(float(p.detach().double().norm()) ** 2 for p in model.parameters()) ** 0.5


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def gpt2(checkpoint: str | None) -> None:
    """GPT-2 small with all certificates."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    if checkpoint:
        load_weights(model, read(checkpoint))
    tokens = torch.randint(0, 50257, (1, 16))
    print(audit(model, tokens, {"use_cache": False}, output=lambda r: r.logits))


def judged(what: str, first: int, count: int) -> None:
    """Random networks: claims that fail, and symmetries that were shown and not claimed."""
    oracle = "channels.oracle" if what == "channels" else "oracle"
    count_wrong = of_tests(oracle).count_wrong
    module, name = RANDOM[what]
    make = getattr(of_tests(module), name)
    total = [0, 0, 0]
    for start in range(first, first + count, 50):
        some = range(start, min(start + 50, first + count))
        counts = count_wrong(some, lambda s, m: print(f"seed {s}: {m}", flush=True), make)
        total = [a + b for a, b in zip(total, counts, strict=True)]
        networks, false, missed = total
        print(
            f"{networks} networks, {false} with a false claim, {missed} with one missed",
            flush=True,
        )


if __name__ == "__main__":
    main()
