"""Make the records of the atlas: ``python -m benchmarks.atlas``, then ``make docs``.

Each architecture is audited in a process of its own, on one thread: without memory first, and with
certificates where that fails, or with ``--certify`` where that ends within the limits. What is
recorded already is left alone unless ``--redo`` is given, so an interrupted run goes on where it
stopped. Needs timm, transformers and torchvision; nothing is downloaded.
"""

import argparse
import fnmatch
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.atlas import records
from benchmarks.atlas.entries import LIBRARIES, Entry, entries
from benchmarks.atlas.processes import Failed, alone
from benchmarks.atlas.relatives import relatives


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.atlas", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names")
    parser.add_argument("--library", dest="origins", nargs="+", choices=LIBRARIES,
                        default=LIBRARIES)  # fmt: skip
    parser.add_argument("--certify", action="store_true", help="with certificates, where they fit")
    parser.add_argument("--redo", action="store_true", help="also what is recorded already")
    parser.add_argument("--seconds", type=int, default=120, help="of computing, for one audit")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of memory, for one audit")
    parser.add_argument("--entries", type=int, default=15_000_000,
                        help="the largest network of timm and torchvision to certify")  # fmt: skip
    parser.add_argument("--records", type=Path, default=records.FOLDER / "records.json")
    chosen = parser.parse_args(arguments)
    data = records.read(chosen.records)
    if data["made_with"] != records.versions():
        if not chosen.redo:
            raise SystemExit(
                f"{chosen.records} was made with {said(data['made_with'])}, and here is "
                f"{said(records.versions())}: give --redo to make its records anew"
            )
        data = {"made_with": records.versions(), "records": {}}
    torch.set_num_threads(1)
    for library in chosen.origins:
        if library != "plain PyTorch":
            importlib.import_module(library)  # once, for all processes
    for entry in entries():
        if entry.origin not in chosen.origins or not matches(entry, chosen.only):
            continue
        for result in steps(entry, data["records"].get(entry.key), chosen):
            data["records"][entry.key] = result
            ordered = {e.key: data["records"].get(e.key) for e in entries()}
            data["records"] = {k: r for k, r in ordered.items() if r is not None}
            data["listed"] = len(ordered)
            records.write(chosen.records, data)
            print(line(entry, result), flush=True)


def matches(entry: Entry, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns)


def said(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def steps(
    entry: Entry, known: dict[str, Any] | None, chosen: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield what is to be recorded of an architecture: first without memory, then certified."""
    done = None if chosen.redo else known
    if done is None:
        done = attempt(entry, [entry.exact] if entry.exact else entry.certified, chosen)
        yield done
    if entry.exact and ("failed" in done or chosen.certify) and may_fit(done, chosen):
        found = attempt(entry, entry.certified, chosen)
        yield found if "failed" not in found else done | {"uncertified": found["failed"]}


def may_fit(done: dict[str, Any], chosen: argparse.Namespace) -> bool:
    """Tell whether certificates are to be tried: not again, and not of what is too large."""
    if done.get("certified") or "uncertified" in done:
        return False
    large = done.get("entries", 0) > chosen.entries and done["library"] != "transformers"
    return not large


def attempt(entry: Entry, commands: Sequence[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the record of the first command that works, or why the last one did not."""
    result: dict[str, Any] = {}
    for command in commands:
        result = {"library": entry.origin, "name": entry.name, "about": entry.about}
        result |= {"command": command, "relatives": relatives(entry.origin, entry.name)}
        try:
            found = alone(
                records.record, command, seconds=chosen.seconds, gigabytes=chosen.gigabytes
            )
        except Failed as error:
            result["failed"] = str(error)
            continue
        return result | found
    return result


def line(entry: Entry, result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"{entry.key}: failed: {result['failed']}"
    how = "certified" if result["certified"] else "exact"
    unknown = f", unknown: {', '.join(result['unknown'])}" if result["unknown"] else ""
    return (
        f"{entry.key}: {result['weights']} weights, {result['symmetries']} symmetries, {how}, "
        f"{result['seconds']} s{unknown}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
