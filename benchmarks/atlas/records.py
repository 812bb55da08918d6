"""What the atlas keeps of an audit: plain numbers and a few lines, made by a command line."""

import argparse
import importlib.metadata
import json
import re
import shlex
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from onsphere._utils.files import write_whole
from onsphere.cli import parser
from onsphere.models.load import load
from onsphere.models.target import parse_shape
from onsphere.symmetry import Audit, audit
from onsphere.symmetry.rendering import text
from onsphere.symmetry.result import Kind

FOLDER = Path(__file__).parents[2] / "docs" / "atlas"
LINES = 4
"""How many lines are kept of each part of an audit."""
LETTERS = 200
"""The longest line that is kept."""
PACKAGES = ("onsphere", "torch", "timm", "torchvision", "transformers")

_NORMS = (
    ("RMSNorm", r"rms|^T5LayerNorm$"), ("BatchNorm", r"batch_?norm"), ("LayerNorm", r"layer_?norm"),
    ("GroupNorm", r"group_?norm"), ("InstanceNorm", r"instance_?norm"),
    ("weight norm", r"weight_?norm"), ("spectral norm", r"spectral_?norm"),
    ("weight standardization", r"(scaled)?std_?conv"),
)  # fmt: skip


def options_of(command: str) -> argparse.Namespace:
    """Read a command as the command line of onsphere does.

    Raises:
        SystemExit: it is none.
    """
    return command_line().parse_args(shlex.split(command)[1:])


@cache
def command_line() -> argparse.ArgumentParser:
    return parser()


def record(command: str) -> dict[str, Any]:
    """Audit what a command names, as it does, and keep what the page shows."""
    options = options_of(command)
    shape = None if options.input is None else parse_shape(options.input)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        target = load(options.target, shape=shape, train=options.train, size=options.size)
        start = time.process_time()
        found = audit(target.model, target.args, target.kwargs, output=target.output)
        seconds = time.process_time() - start
    return {
        **summary(replace(found, note=target.note)),
        "norms": norms(target.model),
        "seconds": round(seconds, 1),
    }


def summary(found: Audit) -> dict[str, Any]:
    """Return the numbers and lines of an audit."""
    kinds = found.kinds
    sizes = {n: text.size(s) for n, s in found.parameters.items()}
    joint = [s for s in found.spheres if s.names[0] not in found.own_spheres()]
    by_channel = text.traded_families(found)
    leaks = [x.amount for x in found.leaks]
    words = Counter(s.granularity for s in found.own_spheres().values())
    return {
        "model": found.model,
        "mode": found.mode,
        "note": found.note,
        "certified": found.certified,
        "weights": len(sizes),
        "entries": sum(sizes.values()),
        "kinds": {
            str(kind): [len(of_kind), sum(sizes[n] for n in of_kind)]
            for kind in Kind
            if (of_kind := [n for n in sizes if kinds[n] == kind])
        },
        "symmetries": len(found.scale_symmetries),
        "granularity": dict(words.most_common()),
        "joint": len(joint),
        "trades": len(found.rescalings),
        "families": len(by_channel),
        "channels": sum(f.count for f in by_channel),
        "shifts": len(found.shifts),
        "parts": len(found.parts),
        "leak": float(f"{max(leaks):.1e}") if leaks else None,
        "unknown": sorted({u.name for u in found.unknown_ops}),
        "limits": [shortened(x.words) for x in found.limits],
        "lines": {
            name: kept
            for name, lines in (
                ("spheres", text.sphere_lines(found)),
                (
                    "joint",
                    [line for b in (False, True) for line in text.joint_lines(found, buffers=b)],
                ),
                ("trades", text.trade_lines(found)),
                ("families", text.family_lines(found)),
                ("shifts", text.shift_lines(found)),
                ("inert", text.folded(found.inert)),
                ("unreached", text.folded(found.unreached)),
            )
            if (kept := first(lines))
        },
    }


def first(lines: Iterable[str]) -> list[str]:
    """Return the first lines, and how many more there are."""
    lines = list(lines)
    more = len(lines) - LINES
    return [shortened(line) for line in lines[:LINES]] + ([f"and {more} more"] if more > 0 else [])


def shortened(line: str) -> str:
    """Cut a line that is too long for a page."""
    return line if len(line) <= LETTERS else f"{line[: LETTERS - 2]} …"


def norms(model: nn.Module) -> list[str]:
    """Name the normalizations among the modules of a model, by the names of their classes."""
    classes = {type(m).__name__ for m in model.modules()}
    return [
        name
        for name, pattern in _NORMS
        if any(re.search(pattern, c, flags=re.IGNORECASE) for c in classes)
    ]


def versions() -> dict[str, str]:
    """Return the versions of what made the records."""
    from onsphere.version import __version__

    found = {"onsphere": __version__}
    for package in PACKAGES[1:]:
        try:
            found[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read(path: Path) -> dict[str, Any]:
    """Read the file of records; one without any where there is none yet."""
    if not path.exists():
        return {"made_with": versions(), "listed": 0, "records": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, data: dict[str, Any]) -> None:
    """Write the file of records, a line for each."""
    lines = ",\n".join(
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in data["records"].items()
    )
    head = f'"made_with": {json.dumps(data["made_with"])},\n "listed": {data["listed"]}'
    write_whole(path, f'{{{head},\n "records": {{\n{lines}\n}}}}\n'.encode())
