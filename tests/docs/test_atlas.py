"""The atlas: records made by the commands it shows, and a page of them that can be searched."""

import argparse
import importlib.util
import json
import re
from html import unescape
from pathlib import Path

import pytest
from benchmarks.atlas.__main__ import main, may_fit, steps
from benchmarks.atlas.entries import LIBRARIES, Entry, entries
from benchmarks.atlas.networks import ABOUT
from benchmarks.atlas.processes import Failed, alone
from benchmarks.atlas.records import first, norms, options_of, read, record
from benchmarks.atlas.relatives import relatives

from report.browser import CHROMIUM, console_of, dom_of, look

pytest.importorskip("docutils")
pytest.importorskip("sphinx")
DOCS = Path(__file__).parents[2] / "docs"
COMMAND = "onsphere audit benchmarks.atlas.networks:mlp"
EVIL = '<img src=x onerror="alert(1)">'
ENTRIES = list(entries())


@pytest.fixture(scope="module")
def atlas():
    spec = importlib.util.spec_from_file_location("atlas", DOCS / "extensions" / "atlas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made() -> dict:
    return record(COMMAND)


@pytest.fixture
def data(made) -> dict:
    base = {"library": "plain PyTorch", "about": "", "command": COMMAND, "relatives": []}
    return {
        "made_with": {"torch": "2.14.1"},
        "listed": 5,
        "records": {
            "a": base | made | {"name": "mlp"},
            "b": base | made | {"name": "unet", "norms": ["BatchNorm"], "certified": False},
            "c": base | {"name": "broken", "failed": "more than 60 s"},
        },
    }


def test_a_record_holds_what_the_command_finds(made):
    assert (made["weights"], made["entries"], made["symmetries"]) == (6, 1732, 2)
    assert (made["trades"], made["joint"], made["shifts"]) == (2, 0, 0)
    assert made["certified"]
    assert made["leak"] < 1e-14
    assert made["unknown"] == []
    assert made["kinds"] == {"rescaling": [5, 1728], "scale-dependent": [1, 4]}
    assert made["lines"]["trades"] == ["i.weight * a, i.bias * a, i+2.weight / a (i = {0,2})"]
    json.dumps(made)


def test_every_network_of_this_package_runs():
    import torch
    from benchmarks.atlas import networks

    for name in ABOUT:
        model, inputs = getattr(networks, name)()
        with torch.no_grad():
            model(*inputs)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_command_is_one_of_the_command_line(library):
    some = [e for e in ENTRIES if e.origin == library]
    assert len({e.name for e in some}) == len(some) > 20
    for entry in some:
        for command in filter(None, (entry.exact, *entry.certified)):
            assert options_of(command).target.endswith(entry.name)


def test_a_command_that_is_none_would_be_seen():
    with pytest.raises(SystemExit):
        options_of("onsphere audit timm:resnet18 --fulll")


def test_the_page_has_a_row_and_a_command_for_every_record(atlas):
    data = read(DOCS / "atlas" / "records.json")
    page = atlas.drawn(data)
    assert page.count("<details ") == len(data["records"]) >= 20
    commands = re.findall(r"<pre>(.*?)</pre>", page)
    assert [unescape(c) for c in commands] == [r["command"] for r in data["records"].values()]
    for command in commands:
        options_of(unescape(command))
    assert {r["library"] for r in data["records"].values()} <= set(LIBRARIES)
    assert "http" not in page


def test_what_records_say_is_escaped(atlas, data):
    for record_ in data["records"].values():
        record_ |= {k: EVIL for k, v in record_.items() if isinstance(v, str) and k != "mode"}
        record_["lines"] = {"trades": [EVIL, EVIL]}
        lists = ("norms", "unknown", "limits", "relatives")
        record_ |= {key: [EVIL] for key in lists}
    page = atlas.drawn(data | {"made_with": {EVIL: EVIL}})
    assert "<img" not in page
    assert page.count("&lt;img") > 20


def test_totals_are_counted(atlas, data):
    text = re.sub(r"<.*?>", "", atlas.drawn(data).partition("</p>")[0])
    assert "3 architectures: 3 of plain PyTorch. 1 audited with certificates, 1 exactly" in text
    assert "1 could not be audited, and none had an operation" in text
    assert text.endswith("2 more are listed, and were not run yet.")


def test_weights_without_effect_are_counted_without_memory_too(atlas, data):
    certified, exact, failed = re.findall(r"<summary>.*?</summary>", atlas.drawn(data))
    assert "0<small> inert" in certified
    assert "0<small> inert" in exact
    assert "not audited: more than 60 s" in failed


def test_names_of_the_same_module_are_found_too():
    pytest.importorskip("timm")
    assert "resnet50" in relatives("timm", "resnet14t")
    assert "resnet50" not in relatives("timm", "vit_tiny_patch16_224")
    assert relatives("transformers", "llama") == []


def test_long_lists_say_what_is_left_out():
    assert first(["x" * 500]) == ["x" * 198 + " …"]
    assert first(map(str, range(7)))[-1] == "and 3 more"


def test_normalizations_are_told_by_their_classes():
    from torch import nn

    net = nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2), nn.RMSNorm(2), nn.Linear(2, 2))
    assert norms(net) == ["RMSNorm", "BatchNorm", "LayerNorm"]


def _raises(given: str) -> dict:
    raise ValueError(f"{given}\nmore")


def _spins(_: str) -> dict:
    while True:
        pass


def _grows(_: str) -> dict:
    import torch

    return {"sum": float(torch.ones(2**30).sum())}


def _dies(_: str) -> dict:
    import os

    os._exit(3)


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (_raises, "ValueError: given$"), (_spins, "more than 1 s"), (_grows, "more than 1 GB"),
        (_dies, r"exit code 3"),
    ],
)  # fmt: skip
def test_an_audit_that_fails_stops_nothing_and_says_why(work, says):
    with pytest.raises(Failed, match=says):
        alone(work, "given", seconds=1, gigabytes=1)
    assert alone(lambda given: {"given": given}, "x", seconds=9, gigabytes=9) == {"given": "x"}


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    path = tmp_path / "records.json"
    words = ["--library", "plain PyTorch", "--records", str(path)]
    main([*words, "--only", "mlp", "siren"])
    assert list(read(path)["records"]) == ["plain PyTorch:mlp", "plain PyTorch:siren"]
    capsys.readouterr()
    main([*words, "--only", "mlp", "actor_critic"])
    assert capsys.readouterr().out.startswith("plain PyTorch:actor_critic: 12 weights")
    changed = json.loads(path.read_text()) | {"made_with": {"torch": "0.4"}}
    path.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match=r"made with torch 0\.4"):
        main([*words, "--only", "mlp"])


def test_certificates_are_tried_once_and_not_where_they_cannot_fit():
    chosen = argparse.Namespace(entries=10)
    small = {"library": "timm", "entries": 9, "certified": False}
    assert may_fit(small, chosen)
    assert not may_fit(small | {"entries": 11}, chosen)
    assert not may_fit(small | {"uncertified": "more than 9 s"}, chosen)
    assert not may_fit(small | {"certified": True}, chosen)


@pytest.mark.parametrize("certify", [False, True])
def test_certificates_follow_where_asked_for_or_where_nothing_else_works(monkeypatch, certify):
    chosen = argparse.Namespace(redo=False, certify=certify, entries=10)
    entry = Entry("transformers", "n", "exact", ("certified",))
    works = {"exact": True, "certified": True}

    def tried(_entry, commands, _chosen):
        base = {"library": "transformers", "command": commands[0]}
        if works[commands[0]]:
            return base | {"certified": commands[0] == "certified"}
        return base | {"failed": "why"}

    def commands(known=None):
        return [r["command"] for r in steps(entry, known, chosen)]

    monkeypatch.setattr("benchmarks.atlas.__main__.attempt", tried)
    assert commands() == ["exact", "certified"][: 1 + certify]
    assert commands({"library": "transformers", "certified": True}) == []
    works["exact"] = False
    assert commands() == ["exact", "certified"]
    works["certified"] = False
    *_, last = steps(entry, None, chosen)
    assert (last["failed"], last["uncertified"]) == ("why", "why")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
class TestInABrowser:
    """The page with its own style and script, alone."""

    @pytest.fixture
    def page(self, atlas, data, tmp_path) -> Path:
        return self.written(atlas.drawn(data), tmp_path)

    def written(self, drawn: str, folder: Path) -> Path:
        style, script = (
            (DOCS / "static" / f"atlas.{kind}").read_text(encoding="utf-8")
            for kind in ("css", "js")
        )
        text = f"<!DOCTYPE html><meta charset=utf-8><title>a</title><style>{style}</style>"
        text += f"<div class=content>{drawn}</div><script>{script}</script>"
        path = folder / "a.html"
        path.write_text(text, encoding="utf-8")
        return path

    @pytest.mark.parametrize(
        ("wanted", "left"),
        [
            ("", ["mlp", "unet", "broken"]), ("q=unet+batch&norm=BatchNorm", ["unet"]),
            ("state=failed", ["broken"]), ("order=name&q=plain", ["broken", "mlp", "unet"]),
        ],
    )  # fmt: skip
    def test_an_address_says_what_is_shown(self, page, wanted, left):
        shown = self.shown(page, wanted)
        assert [re.search(r'data-name="(.*?)"', r)[1] for r in shown] == left
        assert (len(shown) == 1) == any(re.search(r"\bopen\b", r) for r in shown)

    def shown(self, page: Path, wanted: str) -> list[str]:
        """Return the attributes of the rows that an address shows, in their order."""
        rows = re.findall(r"<details ([^>]*)>", dom_of(f"{page.as_uri()}#{wanted}"))
        return [r for r in rows if not re.search(r'\bhidden(=""|$| )', r)]

    @pytest.mark.parametrize(
        ("wanted", "left"),
        [
            ("q=vit", ["vit", "vit_tiny", "vit_b_32", "davit", "levit", "convnet"]),
            ("q=ViT+pytorch", ["vit", "vit_tiny", "vit_b_32", "davit", "levit", "convnet"]),
            ("q=vit_", ["vit_tiny", "vit_b_32", "convnet"]),
            ("q=+", ["davit", "vit_tiny", "convnet", "levit", "vit", "vit_b_32"]),
            ("q=vit&order=name", ["convnet", "davit", "levit", "vit", "vit_b_32", "vit_tiny"]),
        ],
    )  # fmt: skip
    def test_the_nearest_names_come_first(self, atlas, data, tmp_path, wanted, left):
        row = data["records"]["a"] | {"relatives": ["vit_large"]}
        others = ["davit", "vit_tiny", "convnet", "levit", "vit", "vit_b_32"]
        records = {
            n: row | {"name": n} if n == "convnet" else row | {"name": n, "relatives": []}
            for n in others
        }
        page = self.written(atlas.drawn(data | {"records": records}), tmp_path)
        names = [re.search(r'data-name="(.*?)"', r)[1] for r in self.shown(page, wanted)]
        assert names == left

    @pytest.mark.parametrize("width", [390, 1280])
    def test_it_fits_the_screen_and_asks_for_nothing(self, page, width, tmp_path):
        found = look(page.read_text(encoding="utf-8"), width, tmp_path)
        assert found["width"] <= found["view"] == width
        assert found["requests"] == []
        assert console_of(page) == []
