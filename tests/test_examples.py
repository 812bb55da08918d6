"""Every example that a reader may copy runs: docstrings of the package, and the README."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import onsphere

README = Path(__file__).parents[1] / "README.md"
# Triton's language: cannot be imported without Triton, and has no examples.
TILES = {"onsphere.optim.kernels.triton.tiles", "onsphere.optim.kernels.triton.coefficients"}
FOUND = {m.name for m in pkgutil.walk_packages(onsphere.__path__, "onsphere.")}
MODULES = sorted({"onsphere"} | FOUND - TILES)


@pytest.fixture(autouse=True)
def _normal_printing(monkeypatch, tmp_path):
    """As in a fresh interpreter, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.set_printoptions(profile="default")
    with np.printoptions(), torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_doctests_are_found():
    finder = doctest.DocTestFinder(exclude_empty=True)
    counts = {
        name: sum(len(test.examples) for test in finder.find(importlib.import_module(name)))
        for name in MODULES
    }
    for name in ("geometry.sphere", "norms.invariance", "dynamics.growth", "report.html"):
        assert counts[f"onsphere.{name}"] > 0, f"the examples of {name} are not found"
    assert sum(counts.values()) > 100


def blocks(text: str) -> list[str]:
    """Return the contents of the ```python fences."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_blocks_are_those_of_python_only():
    text = "a\n```python\nx = 1\ny = 2\n```\nb\n```sh\nmake\n```\n```python\nz = 3\n```\n"
    assert blocks(text) == ["x = 1\ny = 2\n", "z = 3\n"]


CODE = blocks(README.read_text(encoding="utf-8")) if README.is_file() else []


def test_the_readme_has_examples():
    assert README.is_file(), "README.md is missing"
    assert len(CODE) >= 3, f"README.md has {len(CODE)} python blocks, three were promised"


@pytest.mark.parametrize("code", CODE, ids=[f"block{i + 1}" for i in range(len(CODE))])
def test_readme(code):
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})


AUDIT = Path(__file__).parents[1] / "docs" / "how-to" / "audit.md"


def printed(text: str) -> list[tuple[str, str]]:
    """Return each ```python fence with the ```text fence that follows it, if one does."""
    fence = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?"
    return re.findall(fence, text, flags=re.MULTILINE | re.DOTALL)


def rounded(text: str) -> str:
    """Hide residuals of rounding, which another machine may round otherwise."""
    return re.sub(r"\d(\.\d+)?e-\d+", "#", text).strip()


def test_a_wrong_output_would_be_seen():
    ((code, shown),) = printed("```python\nprint(2e-16)\n```\n\n```text\n3e-17\n```\n")
    assert (code, rounded(shown)) == ("print(2e-16)\n", rounded("2e-16"))
    assert rounded("2 weights") != rounded("3 weights")


def test_how_to_audit_prints_what_it_shows(capsys):
    scope: dict[str, object] = {"__name__": "audit"}
    examples = printed(AUDIT.read_text(encoding="utf-8"))
    assert len([shown for _, shown in examples if shown]) == 6
    for code, shown in examples:
        exec(compile(code, str(AUDIT), "exec"), scope)
        assert rounded(capsys.readouterr().out) == rounded(shown)


def test_how_to_fold_prints_what_it_shows(capsys):
    page = AUDIT.with_name("fold.md")
    ((code, shown),) = printed(page.read_text(encoding="utf-8"))
    exec(compile(code, str(page), "exec"), {"__name__": "fold"})
    assert rounded(capsys.readouterr().out) == rounded(shown)


def test_how_to_add_a_rule_prints_what_it_shows(capsys):
    page = AUDIT.with_name("add-a-rule.md")
    scope: dict[str, object] = {"__name__": "rules"}
    examples = printed(page.read_text(encoding="utf-8"))
    assert len([shown for _, shown in examples if shown]) == 3
    for code, shown in examples:
        exec(compile(code, str(page), "exec"), scope)
        assert capsys.readouterr().out.strip() == shown.strip()


MOVE = Path(__file__).parents[1] / "docs" / "tutorials" / "move-to-the-sphere.md"


def test_the_tutorial_to_the_sphere_prints_what_it_shows(capsys):
    pytest.importorskip("transformers")
    scope: dict[str, object] = {"__name__": "move"}
    examples = printed(MOVE.read_text(encoding="utf-8"))
    assert len([shown for _, shown in examples if shown]) == 4
    for code, shown in examples:
        exec(compile(code, str(MOVE), "exec"), scope)
        assert capsys.readouterr().out.strip() == shown.strip()


@pytest.mark.parametrize("name", ["resnet", "gpt"])
def test_a_tutorial_prints_what_it_shows(name, capsys):
    page = MOVE.with_name(f"{name}.md")
    scope: dict[str, object] = {"__name__": name}
    examples = printed(page.read_text(encoding="utf-8"))
    assert len([shown for _, shown in examples if shown]) >= 3
    for code, shown in examples:
        exec(compile(code, str(page), "exec"), scope)
        assert rounded(capsys.readouterr().out) == rounded(shown)


SHARD = AUDIT.with_name("shard.md")


# What torch 2.9 says of its own way to write a checkpoint.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_how_to_shard():
    code = "\n".join(blocks(SHARD.read_text(encoding="utf-8")))
    assert "fully_shard(model" in code
    assert "dcp.load" in code
    exec(compile(code, str(SHARD), "exec"), {"__name__": "shard"})


MONITOR = AUDIT.with_name("monitor.md")


def test_how_to_monitor():
    pytest.importorskip("matplotlib")
    code = "\n".join(blocks(MONITOR.read_text(encoding="utf-8")))
    assert "osp.Monitor(" in code
    exec(compile(code, str(MONITOR), "exec"), {"__name__": "monitor"})
    assert Path("run.html").stat().st_size > 10_000


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


def test_the_readme_shows_llama_as_it_prints(tmp_path, capsys):
    pytest.importorskip("transformers")
    from onsphere.cli import main

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert main(["audit", str(tmp_path / "config.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = README.read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    assert len(shown.splitlines()) > 10
    assert lines[: len(shown.splitlines())] == shown.splitlines()
    assert len(lines) <= 60
