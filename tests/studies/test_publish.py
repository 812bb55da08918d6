"""One real claim from the command line to the page."""

import json

import pytest

from onsphere import cli
from onsphere.errors import OnsphereError
from onsphere.report import Document
from onsphere.studies.publish import publish
from studies import tiny

pytestmark = pytest.mark.usefixtures("tiny_scale")


@pytest.mark.filterwarnings("always::UserWarning")
def test_records_become_a_page_with_the_verdict(copy, undisturbed, capsys):
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
    assert gain["verdict"] == "undecided"
    assert gain["verdict"] in page
    assert "onsphere study gain --quick" in page
    assert gain["command"] == "onsphere study gain --quick"
    found = {path.name for path in (copy / "figures").iterdir()}
    assert found == {f"gain-spread.{kind}" for kind in ("png", "svg", "pdf")}
    assert not list(copy.glob("**/.*.part"))


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    document = Document(title="t", summary="s", sections=[], provenance={}, warnings=[])
    with pytest.raises(OnsphereError, match="cannot write to the output folder"):
        publish(document, tmp_path / "file")
