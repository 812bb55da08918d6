"""A study: claims in, records and a document out."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from onsphere.errors import OnsphereError, nearest
from onsphere.report.document import Document
from onsphere.studies.claims import (
    causes,
    gain,
    growth,
    invariance,
    robustness,
    sphere,
    stability,
)
from onsphere.studies.claims.base import Claim, Plan
from onsphere.studies.engine.job import Cell, closure
from onsphere.studies.engine.local import LocalEngine
from onsphere.studies.engine.runner import Progress, run
from onsphere.studies.engine.store import Store
from onsphere.studies.engine.work import Engine
from onsphere.studies.setup.data import Source
from onsphere.version import __version__

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        sphere.CLAIM,
        invariance.CLAIM,
        growth.CLAIM,
        stability.CLAIM,
        robustness.CLAIM,
        causes.CLAIM,
        gain.CLAIM,
    )
}
"""Every claim by name, in the order of the report."""


def claims(names: Sequence[str]) -> list[Claim]:
    """Look claims up; none named means all but those on request.

    Raises:
        OnsphereError: there is no such claim.
    """
    for name in names:
        if name not in CLAIMS:
            raise OnsphereError(f"unknown claim {name!r}{nearest(name, list(CLAIMS))}")
    return [
        claim for name, claim in CLAIMS.items() if name in names or not (names or claim.on_request)
    ]


def study(
    names: Sequence[str],
    plan: Plan,
    source: Source,
    folder: Path,
    *,
    engine: Engine | None = None,
    jobs: int = 1,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Document:
    """Run claims and return what they say; records of earlier runs are used again.

    Args:
        names: which claims; none means all but those that are run on request only.
        plan: how large.
        source: where the data set is.
        folder: where records go.
        engine: where cells are computed; worker processes of this machine unless given.
        jobs: how many of these.
        progress: called after every cell.

    Returns:
        The document of the report, made from records alone.

    Raises:
        OnsphereError: an unknown claim, no seeds, data that cannot be read, a folder that cannot
            be written, an engine that does not answer.
    """
    chosen = claims(names)
    if not plan.seeds:
        raise OnsphereError("a study needs at least one seed, got none")
    engine = engine or LocalEngine(jobs)
    source.load()  # a missing file is told before anything is made
    store = Store(folder)
    cells = [cell for claim in chosen for cell in claim.cells(plan)]
    with engine:
        run(cells, store, source, engine=engine, report=progress)
    machines = _machines(cells, store)
    results = {cell.key: store.read(cell) or {} for cell in cells}
    sections = [claim.section(plan, results, _command(plan, claim.name)) for claim in chosen]
    return Document(
        title="Normalization, seen on the sphere",
        summary="The claims of Sun et al., New Interpretations of Normalization Methods in Deep "
        f"Learning (AAAI 2020), tested on {plan.data} with a small convolutional network: "
        f"{len(plan.methods)} methods, {len(plan.seeds)} "
        f"{'seed' if len(plan.seeds) == 1 else 'seeds'}. Every picture and number on this page "
        "was made from records measured by the command beside it.",
        sections=sections,
        provenance={
            "command": _command(plan, *names),
            "data": plan.data,
            "seeds": ", ".join(map(str, plan.seeds)),
            "size": plan.size,
            "cells": str(len({cell.key for cell in cells})),
            "onsphere": __version__,
            "torch": torch.__version__,
            "processor": "; ".join(machines),
        },
        warnings=_warnings(plan, machines),
    )


def _machines(cells: Sequence[Cell], store: Store) -> list[str]:
    """Return the kinds of machines that computed the cells and all they build on."""
    kinds = Counter(str(store.machine(cell) or "not recorded") for cell in closure(list(cells)))
    if len(kinds) == 1:
        return list(kinds)
    return [f"{kind}: {count:,} of {kinds.total():,} cells" for kind, count in kinds.most_common()]


def _command(plan: Plan, *names: str) -> str:
    words = ["onsphere", "study", *names]
    if plan.data != "digits":
        words += ["--data", plan.data]
    if plan.size != "default":
        words.append(f"--{plan.size}")
    if plan.seeds != tuple(range(plan.scale.seeds)):
        words += ["--seeds", str(len(plan.seeds))]
    return " ".join(words)


def _warnings(plan: Plan, machines: Sequence[str]) -> list[str]:
    warnings = []
    if plan.size == "quick":
        warnings.append(
            "A quick run shows that everything works. Its networks are hardly trained: do not "
            "quote its numbers."
        )
    if len(plan.seeds) == 1:
        warnings.append("One seed: verdicts that rest on training are left undecided.")
    if len(machines) > 1:
        warnings.append(
            f"The records come from {len(machines)} kinds of processors, which round sums "
            "differently: runs that are equal to rounding on one of them differ here."
        )
    return warnings
