"""Run one claim of the paper on this machine, small, and print what came out.

The same as ``onsphere study sphere --quick``.
"""

import tempfile
from pathlib import Path

from onsphere.cli import main


def run(folder):
    """Run the claim, leave records and a report in a folder, and say where."""
    words = ["study", "sphere", "--quick", "--jobs", "1", "--out", str(folder)]
    code = main(words)
    files = sorted(path.name for path in Path(folder).iterdir())
    print("written:", ", ".join(files))
    return code


if __name__ == "__main__":
    raise SystemExit(run(Path(tempfile.mkdtemp()) / "results"))
