"""The scripts in examples/ run, and print what the gallery shows, but for the numbers."""

import contextlib
import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def words(text: str) -> list[str]:
    """Return the words of an output, without numbers, places and rules."""
    text = re.sub(r"\S*results/report\.html", "results/report.html", text)
    return re.findall(r"[A-Za-z_]{2,}", text)


def test_other_words_would_be_seen():
    assert words("length 3.24 -> 6.25") == words("length 1.5 -> 10")
    assert words("sphere holds") != words("sphere fails")


def test_the_gallery_shows_each_script_and_its_output():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) == 5
    for name in SCRIPTS:
        assert f"../examples/{name}.py" in page
        assert f"../examples/{name}.txt" in page
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 50


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_prints_what_the_gallery_shows(name, capsys, monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with torch.random.fork_rng(devices=[]), contextlib.suppress(SystemExit):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    shown = (EXAMPLES / f"{name}.txt").read_text(encoding="utf-8")
    assert words(capsys.readouterr().out) == words(shown)
