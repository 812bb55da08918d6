"""Progress: lines in a pipe now and then, a bar on a terminal, nothing where nothing was asked."""

import pytest
import torch
from rich.console import Console

import onsphere as osp
from onsphere.report import progress


def test_lines_say_how_long_it_takes_and_what_is_left(capsys):
    now = iter([0.0, 1.0, 12.0, 15.0, 24.0])
    lines = progress.Lines(lambda: next(now))
    lines("apgd", 0, 40)  # 1 s: too early
    lines("apgd", 10, 40)  # 12 s
    lines("apgd", 12, 40)  # 15 s: the last line is fresh
    lines("fab")  # 24 s
    said = capsys.readouterr().err.splitlines()
    assert said == ["apgd 10 of 40, 12 s, 33 s left", "fab, 24 s"]


def test_stages_count(capsys):
    seen = []
    at = progress.in_stages(lambda *words: seen.append(words), ["a", "b", "c"])
    for stage in ("a", "c", "unheard of", "b"):
        at(stage)
    assert seen == [("a", 0, 3), ("c", 2, 3), ("unheard of", 2, 3), ("b", 2, 3)]


@pytest.mark.parametrize("terminal", [True, False])
def test_an_audit_and_an_evaluation_show_themselves(terminal, monkeypatch, capsys):
    consoles = lambda **_: Console(stderr=True, force_terminal=terminal, width=100)  # noqa: E731
    monkeypatch.setattr(progress, "Console", consoles)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    net, x = torch.nn.Linear(3, 2), torch.rand(4, 3)
    osp.audit(net, x, progress=True)
    assert "looking for finer spheres and shifts" in capsys.readouterr().err
    osp.robustness.evaluate(
        net, (x, net(x).argmax(1)), eps=0.01, attacks="apgd-ce", checks=False, progress=True
    )
    assert "apgd-ce" in capsys.readouterr().err
    osp.audit(net, x)
    assert capsys.readouterr() == ("", "")
