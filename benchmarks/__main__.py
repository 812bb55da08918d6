"""Print measurements as one table of ratios.

``python -m benchmarks [norms|optim|attacks|optim-cuda ...]``; ``python -m benchmarks dynamics``
prints laws and predictions beside what comes out instead, ``python -m benchmarks folding`` what
folding does beside PyTorch's own tools, ``python -m benchmarks int8 FOLDER`` what equalizing does,
``python -m benchmarks peers`` both beside AIMET and torch-pruning, ``python -m benchmarks merging
FOLDER`` what canonical forms do to a linear merge, ``python -m benchmarks ensembles [METHOD ...]``
small networks trained together and alone. ``python -m benchmarks.NAME --help`` tells of the
others: atlas, audit_time, evidence, shifts, symmetry, transfer.
"""

import sys

import torch
from rich.console import Console

from benchmarks import attacks, dynamics, ensembles, folding, int8, merging, norms, optim, peers
from onsphere.report import Table, table


def main() -> None:
    """Measure everything; a ratio below 1 means that ours is faster."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return
    if sys.argv[1:] == ["dynamics"]:
        for page in dynamics.tables():
            Console(width=120).print(table(page))
        return
    pages = {
        "folding": folding.tables,
        "int8": int8.tables,
        "peers": peers.tables,
        "merging": merging.tables,
        "ensembles": ensembles.tables,
    }
    if sys.argv[1:2] and sys.argv[1] in pages:
        for page in pages[sys.argv[1]](sys.argv[2:]):
            Console(width=160).print(table(page))
        return
    measures = {"norms": norms.measure, "optim": optim.measure, "attacks": attacks.measure}
    on_request = {"optim-cuda": optim.measure_on_cuda}
    rows = []
    unknown = [name for name in sys.argv[1:] if name not in measures | on_request]
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is none of norms, optim, attacks, optim-cuda; {__doc__}")
    for name in sys.argv[1:] or measures:
        for p in (measures | on_request)[name]():
            rows.append((p.name, p.peer, p.ours_ms, p.ratio, f"{p.low:.2f} – {p.high:.2f}"))
            print(f"{p.name}, against {p.peer}: {p.ratio:.2f}", file=sys.stderr, flush=True)
    columns = ("what", "against", "ours, ms", "ours / theirs", "quartiles")
    note = f"{torch.get_num_threads()} threads, alternating, medians over pairs."
    Console(width=100).print(table(Table("Side by side", columns, rows, note)))


if __name__ == "__main__":
    main()
