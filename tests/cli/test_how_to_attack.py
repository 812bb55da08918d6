"""The how-to of attacks prints what it shows, and its options exist."""

import math
import re
from pathlib import Path

import pytest

from onsphere import cli

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "attack.md"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:×10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?")


def fences(kind: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def alike(shown: str, printed: str) -> bool:
    """The same words, and numbers that agree to 5 %: machines round and sum in their own order."""
    ours, theirs = ([float(n.split("×")[0]) for n in NUMBER.findall(t)] for t in (shown, printed))
    words = [NUMBER.sub("#", re.sub(r"[ ─]+", " ", t)).split() for t in (shown, printed)]
    return (
        words[0] == words[1]
        and len(ours) == len(theirs)
        and all(math.isclose(a, b, rel_tol=0.05) for a, b in zip(ours, theirs, strict=True))
    )


def test_another_number_or_word_would_be_seen():
    assert alike("gain 1.50 ~", "gain   1.52 ~")
    assert not alike("gain 1.5", "gain 1.7")
    assert not alike("gain 1.5 ~", "gain 1.5")
    assert not alike("gain 1.5", "loss 1.5")


def test_it_prints_what_it_shows(capsys):
    (random, code), (shown,) = fences("python"), fences("text")
    exec(compile(random, str(PAGE), "exec"), {"__name__": "random"})  # asserts what it says
    exec(compile(code, str(PAGE), "exec"), {"__name__": "attack"})
    printed = capsys.readouterr().out
    assert len(shown.splitlines()) > 10
    assert alike(shown, printed), printed


COMMANDS = re.findall(r"^onsphere .*$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_commands_are_found():
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_can_be_parsed(line):
    words = line.partition(">")[0].split()[1:]
    options = cli.parser().parse_args(words)
    assert (options.command, options.target) == ("attack", "net.py:net")
