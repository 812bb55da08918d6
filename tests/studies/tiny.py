"""The smallest real study, for tests; as a script, the command line with quick made this small.

``python -m studies.tiny study gain --quick ...`` with ``tests`` on the path.
"""

import sys
from dataclasses import replace
from pathlib import Path

from onsphere import cli
from onsphere.studies.claims import plan
from onsphere.studies.claims.plan import Plan
from onsphere.studies.setup.data import Source
from onsphere.studies.study import study

NAMES = ("gain",)
PLAN = Plan("digits", (0,), "quick")
WORDS = ("study", *NAMES, "--quick")
TINY = replace(plan.SCALES["quick"], steps=50, width=4)


def run(folder: Path, jobs: int = 1):
    """Run the tiny study in this process (``claim.SCALES`` must be patched with TINY)."""
    return study(NAMES, PLAN, Source("digits"), folder, jobs=jobs)


def contents(folder: Path) -> dict[str, bytes]:
    """Every record and network by name; what was set aside or left half written is not one."""
    kept = [*folder.glob("records/*.json"), *folder.glob("networks/*.safetensors")]
    return {path.name: path.read_bytes() for path in kept}


if __name__ == "__main__":
    plan.SCALES["quick"] = TINY
    sys.exit(cli.main(sys.argv[1:]))
