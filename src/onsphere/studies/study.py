"""A study: claims in, records and a document out."""

import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from onsphere.errors import OnsphereError, nearest
from onsphere.report.document import Document, Outcome, Section, Table
from onsphere.studies.claims import gain, growth, invariance, robustness, sphere, stability
from onsphere.studies.claims.base import Claim
from onsphere.studies.claims.plan import Plan, label
from onsphere.studies.claims.statement import FEWEST, Decision, Unit, decide, text_of
from onsphere.studies.engine.job import Cell, closure
from onsphere.studies.engine.local import LocalEngine
from onsphere.studies.engine.runner import Progress, run
from onsphere.studies.engine.store import Store
from onsphere.studies.engine.work import Engine
from onsphere.studies.protocol import Protocol, close, register, spent_before
from onsphere.studies.setup.architectures import architecture
from onsphere.studies.setup.data import Source
from onsphere.studies.setup.network import LABELS, STUDIED
from onsphere.version import __version__

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        sphere.CLAIM,
        invariance.CLAIM,
        growth.CLAIM,
        stability.CLAIM,
        robustness.CLAIM,
        gain.CLAIM,
    )
}
"""Every claim by name, in the order of the report."""

TERMS = {
    "margin": "the smallest effect that would matter, fixed before anything is measured",
    "none": "no normalization, the control",
    "BN, LN, IN, GN": "batch, layer, instance and group normalization",
    "RMS": "root mean square normalization of a layer, without centring",
    "WN": "weight normalization: each filter is a length times a direction",
    "CWN": "centred weight normalization: the mean of each filter is taken off first",
    "SN": "spectral normalization: a weight over its largest singular value",
    "plain": "training as usual: every weight is free",
    "sphere": "training in which each normalized weight keeps its length and only turns",
    "hidden, head": "the weights with a normalization; the last, linear layer, which has none",
    "gain, shift": "what a normalization learns: weight and bias of a BatchNorm",
    "spread": "standard deviation of a pre-activation: of what reaches the normalization",
    "robust accuracy": "share of test images that stay right under every attack that was tried",
    "PGD": "projected gradient descent: an attack that climbs the loss inside the allowed change",
    "Auto-PGD": "the same with steps that adapt (Croce and Hein 2020); on several losses here",
    "DLR": "difference of logits ratio: a loss that no scale of the logits changes",
    "rotation": "angle by which a weight turns in a step",
    "effective rate": "learning rate over squared norm: what decides how far a weight turns",
    "decade": "a factor of ten",
    "eps": "the small number in a normalization's root; also the radius of an attack",
}
"""Abbreviations and terms of the report, and what they stand for."""


def claims(names: Sequence[str], network: str = "small") -> list[Claim]:
    """Look claims up; none named means all that a network can be asked.

    Raises:
        OnsphereError: there is no such claim, or it makes no sense in the network.
    """
    own = architecture(network).own_spheres
    for name in names:
        if name not in CLAIMS:
            raise OnsphereError(f"unknown claim {name!r}{nearest(name, list(CLAIMS))}")
        if CLAIMS[name].own_spheres and not own:
            raise OnsphereError(
                f"the claim {name!r} speaks of weights with spheres of their own, which {network} "
                "has not under every method; name another claim or another --network"
            )
    return [
        claim
        for name, claim in CLAIMS.items()
        if name in names or not (names or (claim.own_spheres and not own))
    ]


def study(
    names: Sequence[str],
    plan: Plan,
    source: Source,
    folder: Path,
    *,
    engine: Engine | None = None,
    jobs: int = 1,
    budget: float | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    announce: Callable[[str], None] = lambda _: None,
) -> Document:
    """Run claims and return what they say; records of earlier runs are used again.

    A plan with several looks adds seeds, look by look, to the comparisons that are still open.

    Args:
        names: which claims; none means all.
        plan: how large.
        source: where the data set is.
        folder: where records go.
        engine: where cells are computed; worker processes of this machine unless given.
        jobs: how many of these.
        budget: seconds; no look is begun that would probably end later.
        progress: called after every cell.
        announce: told, after each look but the last, what is open and how many seeds it takes.

    Returns:
        The document of the report, made from records alone.

    Raises:
        OnsphereError: an unknown claim, no seeds, data that cannot be read, a folder that cannot
            be written, an engine that does not answer.
    """
    chosen = claims(names, plan.network)
    if not plan.seeds:
        raise OnsphereError("a study needs at least one seed, got none")
    with engine or LocalEngine(jobs) as entered:  # workers start while this process reads the data
        source.load()  # a missing file is told before anything is made
        store = Store(folder)
        protocols = {claim.name: register(claim, plan, store) for claim in chosen}
        found = _look_by_look(chosen, plan, store, source, entered, budget, progress, announce)
    machines = _machines(found.cells, store)
    sections = [
        claim.section(
            plan, found.results, found.decisions[claim.name], _command(plan, claim.name)
        ).noting(str(protocols[claim.name]))
        for claim in chosen
    ]
    if len(plan.looks) > 1:
        sections.append(_pilot_section(chosen, found))
    return Document(
        title="Normalization, seen on the sphere",
        summary="The claims of Sun et al., New Interpretations of Normalization Methods in Deep "
        f"Learning (AAAI 2020), tested on {_name(plan)} with {plan.architecture.title}. Each "
        "claim is taken apart into statements that a measurement can decide: holds, reversed (the "
        "contrary holds), absent (no effect that would matter), differs (methods disagree), or "
        "undecided. What is proved follows from mathematics and is only checked here; what is "
        "measured is about this network and these data.",
        sections=sections,
        provenance={
            "command": _command(plan, *names),
            "data": plan.data,
            "seeds": f"{plan.looks[found.reached - 1]}",
            "size": plan.size,
            "network": plan.network,
            "cells": f"{len(closure(found.cells)):,}",
            "onsphere": __version__,
            "torch": torch.__version__,
            "processor": "; ".join(machines),
            "rules": _when_written(list(protocols.values())),
        },
        warnings=[*_warnings(plan, machines), *found.stopped],
        terms=TERMS,
    )


@dataclass
class _Found:
    """What the looks gave.

    Attributes:
        cells: all that were asked for.
        results: their records by key.
        decisions: of each claim.
        reached: how many looks were taken.
        pilot: decisions after the first look.
        stopped: why not all looks were taken that something open asked for, and what an earlier
            end costs; empty otherwise.
    """

    cells: list[Cell] = field(default_factory=list)
    results: dict[str, dict[str, object]] = field(default_factory=dict)
    decisions: dict[str, dict[Unit, Decision]] = field(default_factory=dict)
    reached: int = 0
    pilot: dict[str, dict[Unit, Decision]] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)


def _look_by_look(
    chosen: Sequence[Claim],
    plan: Plan,
    store: Store,
    source: Source,
    engine: Engine,
    budget: float | None,
    progress: Callable[[Progress], None],
    announce: Callable[[str], None],
) -> _Found:
    found, begun, spent = _Found(), time.monotonic(), 0.0
    for look in range(len(plan.looks)):
        cells = _wanted(chosen, plan, found, look)
        cost = sum(cell.cost for cell in closure(cells) if not store.has(cell))
        if look > 0:
            if not _open(found):
                break
            announce(_outlook(plan, found))
            taken = time.monotonic() - begun
            more = cost * (taken / spent if spent else 1.0)
            if budget is not None and cost and taken + more > budget:
                found.stopped.append(_out_of_time(plan, look, taken + more))
                close(chosen, plan.looks[look - 1], store)
                found.decisions = _decided(chosen, plan, found, closing=True)
                break
        run(cells, store, source, engine=engine, report=progress)
        spent += cost
        found.cells = list({cell.key: cell for cell in [*found.cells, *cells]}.values())
        found.results |= {cell.key: store.read(cell) or {} for cell in cells}
        found.reached = look + 1
        found.decisions = _decided(chosen, plan, found)
        found.pilot = found.pilot or found.decisions
    twice = spent_before(chosen, plan.looks[found.reached - 1], store)
    if twice and len(plan.looks) > 1:
        found.stopped.append(twice)
    return found


def _decided(
    chosen: Sequence[Claim], plan: Plan, found: _Found, *, closing: bool = False
) -> dict[str, dict[Unit, Decision]]:
    return {
        claim.name: decide(claim.statements, plan, found.results, found.reached, closing=closing)
        for claim in chosen
    }


def _wanted(chosen: Sequence[Claim], plan: Plan, found: _Found, look: int) -> list[Cell]:
    return [
        cell
        for claim in chosen
        for cell in claim.cells(plan, found.decisions.get(claim.name), look)
    ]


def _open(found: _Found) -> list[Decision]:
    return [
        decision
        for decisions in found.decisions.values()
        for decision in decisions.values()
        if decision.outcome == Outcome.OPEN
    ]


def _outlook(plan: Plan, found: _Found) -> str:
    """Say what is open and how many seeds it would take."""
    pending = _open(found)
    total = sum(len(decisions) for decisions in found.decisions.values())
    most = plan.looks[-1]
    within = sum(1 for one in pending if one.needed is not None and one.needed <= most)
    return (
        f"After {plan.looks[found.reached - 1]} seeds, {total - len(pending)} of {total} "
        f"comparisons are decided; {within} more probably will be with at most {most} seeds"
    )


def _out_of_time(plan: Plan, look: int, seconds: float) -> str:
    hours, minutes = divmod(int(seconds / 60) + 1, 60)
    needed = f"{hours}h{minutes}m" if hours else f"{minutes}m"
    return (
        f"The time was up after {plan.looks[look - 1]} seeds, so this was the last look, and it "
        f"took all that was left of the 5 %. To go on with {plan.looks[look]} seeds, run the same "
        f"command again with --budget {needed} or more; what was measured is kept."
    )


def _pilot_section(chosen: Sequence[Claim], found: _Found) -> Section:
    rows = []
    for claim in chosen:
        by_name = {one.name: one for one in claim.statements}
        for (name, method), first in found.pilot[claim.name].items():
            last = found.decisions[claim.name][name, method]
            if by_name[name].kind == "identity" or first.estimate is None:
                continue
            needed = first.estimate.count if first.needed is None else first.needed
            rows.append(
                (
                    f"{claim.name}: {name}",
                    label(method),
                    text_of(by_name[name], first.estimate),
                    int(needed) if needed < 1000 else None,
                    last.estimate.count if last.estimate else None,
                    last.outcome.value,
                )
            )
    return Section(
        name="pilot",
        title="How many seeds it takes",
        statement="Seeds were added until a comparison was decided, no look was left or the time "
        "was up. The first look is the pilot: its mean and spread say how many seeds each "
        "comparison will probably take.",
        figure_of_merit=f"{found.reached} looks",
        tables=[
            Table(
                "What the pilot said, and what came out",
                ("comparison", "method", "pilot", "seeds, predicted", "seeds, used", "outcome"),
                rows,
                "A dash: more than a thousand.",
            )
        ],
    )


def _when_written(protocols: Sequence[Protocol]) -> str:
    late = any(protocol.records_before for protocol in protocols)
    when = "in part after records were there (each claim says)" if late else "before any was there"
    return (
        f"hashed into the folder of records {when}; in earlier versions a rule was changed once "
        "after the first results on digits, and once how comparisons share their errors"
    )


def _machines(cells: Sequence[Cell], store: Store) -> list[str]:
    """Return the kinds of machines that computed the cells and all they build on."""
    kinds = Counter(str(store.machine(cell) or "not recorded") for cell in closure(list(cells)))
    if len(kinds) == 1:
        return list(kinds)
    return [f"{kind}: {count:,} of {kinds.total():,} cells" for kind, count in kinds.most_common()]


def _name(plan: Plan) -> str:
    """Return the name of the data set, without the checksum of a file."""
    return plan.data.rsplit("@", 1)[0]


def _command(plan: Plan, *names: str) -> str:
    words = ["onsphere", "study", *names]
    if plan.data != "digits":
        words += ["--data", _name(plan)]
    if plan.network != "small":
        words += ["--network", plan.network]
    if plan.size != "default":
        words.append(f"--{plan.size}")
    if len(plan.looks) > 1:
        words.append("--until-decided")
        usual = plan.scale.looks[-1]
    else:
        usual = plan.scale.seeds
    if len(plan.seeds) != usual:
        words += ["--seeds", str(len(plan.seeds))]
    return shlex.join(words)


def _warnings(plan: Plan, machines: Sequence[str]) -> list[str]:
    warnings = []
    if plan.size == "quick":
        warnings.append(
            "A quick run only shows that everything works. Its networks are hardly trained: do "
            "not quote its numbers."
        )
    left_out = [LABELS[m] for m in STUDIED if m not in plan.methods]
    if left_out:
        warnings.append(f"{plan.network} has no place for {', '.join(left_out)}: left out.")
    if len(plan.seeds) < FEWEST:
        warnings.append(
            f"Fewer than {FEWEST} seeds decide nothing but what must hold for each of them."
        )
    if len(machines) > 1:
        warnings.append(
            f"The records come from {len(machines)} kinds of processors, which round sums "
            "differently: runs that are equal to rounding on one of them differ here."
        )
    return warnings
