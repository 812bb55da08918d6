"""One real claim from the command line to the page."""

import json
import re

import pytest

from onsphere import cli
from onsphere.errors import OnsphereError
from onsphere.report import Document, Figure, Panel, Section, Series
from onsphere.studies.publish import publish
from studies import tiny

pytestmark = pytest.mark.usefixtures("tiny_scale")


@pytest.mark.filterwarnings("always::UserWarning")
def test_records_become_a_page_with_the_outcomes(copy, undisturbed, capsys):
    """Finished records are used as they are; one that is damaged is told, and computed again."""
    record = min(copy.glob("records/*.json"))
    record.write_text(record.read_text()[:50])
    assert cli.main([*tiny.WORDS, "--jobs", "1", "--json", "--out", str(copy)]) == 0
    out, error = capsys.readouterr()
    assert error.startswith(f"onsphere: warning: record {record.name} was set aside")
    assert error.count("\n") == 1
    assert tiny.contents(copy) == tiny.contents(undisturbed)
    gain = json.loads(out)["claims"]["gain"]
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert gain["statements"]["gain-approaches"]["outcome"] == "undecided"
    assert gain["statements"]["gain-is-length"]["outcome"] == "holds"
    assert gain["advice"] in page
    assert "onsphere study gain --quick" in page
    assert gain["command"] == "onsphere study gain --quick"
    assert not (copy / "figures").exists()  # a quick run draws them once, for the page
    assert not list(copy.glob("**/.*.part"))


def test_a_study_in_a_pipe_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("onsphere.report.progress.SECONDS_BETWEEN_LINES", 0.0)
    assert cli.main([*tiny.WORDS, "--jobs", "1", "--out", str(tmp_path / "out")]) == 0
    out, error = capsys.readouterr()
    assert "An outcome is that of the methods that are decided" in " ".join(out.split())
    said = error.splitlines()
    assert all(
        re.fullmatch(r"(measuring \d+%|drawing figures.*), \d+ s(, .+ left)?", line)
        for line in said
    ), said
    assert any(line.endswith(", 0 s left") for line in said)
    assert cli.main([*tiny.WORDS, "--json", "--jobs", "1", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""


def test_files_of_figures_are_written_beside_the_page(tmp_path):
    panel = Panel("BN", "step", "norm", [Series("plain", [1, 2], [3.0, 4.0])])
    figure = Figure("a", "A", "", [panel])
    section = Section(name="a", title="A", statement="", figures=[figure])
    document, told = Document("t", "s", [section]), []
    publish(document, tmp_path, progress=lambda *count: told.append(count))
    kinds = {path.name for path in (tmp_path / "figures").iterdir()}
    assert kinds == {f"a.{kind}" for kind in ("png", "svg", "pdf")}
    assert told == [(1, 1)]


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    document = Document(title="t", summary="s", sections=[], provenance={}, warnings=[])
    with pytest.raises(OnsphereError, match="cannot write to the output folder"):
        publish(document, tmp_path / "file")
