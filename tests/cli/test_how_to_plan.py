"""The commands of the how-to run, and print what it shows."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "plan.md"
FENCE = r"^```(sh|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?"
EXAMPLES = re.findall(FENCE, GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def printed(command, kind: str, code: str) -> str:
    if kind == "python":
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            exec(compile(code, str(GUIDE), "exec"), {"__name__": "plan"})
        return stream.getvalue()
    found = ""
    for line in code.splitlines():
        program, *words = shlex.split(line)
        assert program == "onsphere"
        status, out, error = command(*words)
        assert (status, error) == (0, "")
        found += out
    return found


def test_the_guide_has_examples():
    assert len(EXAMPLES) >= 6
    assert len([shown for *_, shown in EXAMPLES if shown]) >= 4


@pytest.mark.parametrize(("kind", "code", "shown"), EXAMPLES)
def test_it_prints_what_it_shows(command, kind, code, shown):
    out = printed(command, kind, code)
    assert out
    if shown:
        assert out.rstrip("\n") == shown.rstrip("\n")
