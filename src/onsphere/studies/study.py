"""A study: claims in, records and a document out."""

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
from onsphere.studies.engine.runner import Progress, check_jobs, run
from onsphere.studies.engine.store import Store
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
        causes.CLAIM,
        gain.CLAIM,
    )
}
"""Every claim by name, in the order of the report."""


def claims(names: Sequence[str], network: str = "small") -> list[Claim]:
    """Look claims up; none named means all that a network can be asked but those on request.

    Raises:
        OnsphereError: there is no such claim, or it makes no sense in the network.
    """
    for name in names:
        if name not in CLAIMS:
            raise OnsphereError(f"unknown claim {name!r}{nearest(name, list(CLAIMS))}")
    own = architecture(network).own_spheres
    for name in names:
        if CLAIMS[name].own_spheres and not own:
            raise OnsphereError(
                f"the claim {name!r} speaks of weights with spheres of their own, which {network} "
                "has not under every method; name another claim or another --network"
            )
    return [
        claim
        for name, claim in CLAIMS.items()
        if name in names or not (names or claim.on_request or (claim.own_spheres and not own))
    ]


def study(
    names: Sequence[str],
    plan: Plan,
    source: Source,
    folder: Path,
    *,
    jobs: int = 1,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Document:
    """Run claims and return what they say; records of earlier runs are used again.

    Args:
        names: which claims; none means all but those that are run on request only.
        plan: how large.
        source: where the data set is.
        folder: where records go.
        jobs: how many worker processes.
        progress: called after every cell.

    Returns:
        The document of the report, made from records alone.

    Raises:
        OnsphereError: an unknown claim, no seeds, data that cannot be read, a folder that cannot
            be written.
    """
    chosen = claims(names, plan.network)
    if not plan.seeds:
        raise OnsphereError("a study needs at least one seed, got none")
    check_jobs(jobs)
    source.load()  # a missing file is told before anything is made
    store = Store(folder)
    cells = [cell for claim in chosen for cell in claim.cells(plan)]
    run(cells, store, source, jobs=jobs, report=progress)
    results = {cell.key: store.read(cell) or {} for cell in cells}
    sections = [claim.section(plan, results, _command(plan, claim.name)) for claim in chosen]
    return Document(
        title="Normalization, seen on the sphere",
        summary="The claims of Sun et al., New Interpretations of Normalization Methods in Deep "
        f"Learning (AAAI 2020), tested on {plan.data} with {plan.architecture.title}: "
        f"{len(plan.methods)} methods, {len(plan.seeds)} "
        f"{'seed' if len(plan.seeds) == 1 else 'seeds'}. Every picture and number on this page "
        "was made from records measured by the command beside it.",
        sections=sections,
        provenance={
            "command": _command(plan, *names),
            "data": plan.data,
            "network": plan.network,
            "seeds": ", ".join(map(str, plan.seeds)),
            "size": plan.size,
            "cells": str(len({cell.key for cell in cells})),
            "onsphere": __version__,
            "torch": torch.__version__,
        },
        warnings=_warnings(plan),
    )


def _command(plan: Plan, *names: str) -> str:
    words = ["onsphere", "study", *names]
    if plan.data != "digits":
        words += ["--data", plan.data.rsplit("@", 1)[0]]  # without the checksum of a file
    if plan.network != "small":
        words += ["--network", plan.network]
    if plan.size != "default":
        words.append(f"--{plan.size}")
    if plan.seeds != tuple(range(plan.scale.seeds)):
        words += ["--seeds", str(len(plan.seeds))]
    return " ".join(words)


def _warnings(plan: Plan) -> list[str]:
    warnings = []
    left_out = [LABELS[m] for m in STUDIED if m not in plan.methods]
    if left_out:
        warnings.append(f"{plan.network} has no place for {', '.join(left_out)}: left out.")
    if plan.size == "quick":
        warnings.append(
            "A quick run shows that everything works. Its networks are hardly trained: do not "
            "quote its numbers."
        )
    if len(plan.seeds) == 1:
        warnings.append("One seed: verdicts that rest on training are left undecided.")
    return warnings
