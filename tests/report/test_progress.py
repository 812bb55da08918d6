"""Progress: lines in a pipe now and then, a bar on a terminal, nothing where nothing was asked."""

import re

import pytest
import torch
from rich.console import Console

import onsphere as osp
from onsphere.report import progress
from onsphere.symmetry.audit import STAGES


def test_lines_say_how_long_it_takes_and_what_is_left(capsys):
    now = iter([0.0, 1.0, 12.0, 15.0, 24.0])
    lines = progress.Lines(lambda: next(now))
    lines("apgd", 0, 40)  # 1 s: too early
    lines("apgd", 10, 40)  # 12 s
    lines("apgd", 12, 40)  # 15 s: the last line is fresh
    lines("fab")  # 24 s
    said = capsys.readouterr().err.splitlines()
    assert said == ["apgd 10 of 40, 12 s, 33 s left", "fab, 24 s"]


def stages(times, costs):
    """What is shown of stages that begin or go on at these times."""
    seen, now = [], iter(times)

    def show(stage, share=None, left=None):
        seen.append((stage, share, left))

    return progress.Stages(show, costs, lambda: next(now)), seen


def test_stages_count_by_what_they_cost():
    at, seen = stages([0.0, 5.0, 7.0, 8.0, 14.0, 15.0], {"a": 20, "b": 70, "c": 10})
    at("loading")
    at("a")  # begins at 5 s
    at("b")  # the fifth part took 2 s
    at("unheard of")
    at("c")  # 90 parts took 9 s
    at("b")
    assert seen[:2] == [("loading", None, None), ("a", 0.0, None)]
    assert seen[2] == ("b", 0.2, pytest.approx(8.0))
    assert seen[3] == ("unheard of", pytest.approx(3 / 11), pytest.approx(8.0))
    assert seen[4] == ("c", pytest.approx(0.9), pytest.approx(1.0))
    assert seen[5][1] >= seen[4][1]


def test_a_stage_slower_than_its_cost_is_counted_by_the_clock():
    at, seen = stages([0.0, 1.0, 7.0, 9.0, 10.0], {"a": 50, "b": 50})
    at("a")
    at("b")
    at("b", 0.5)  # 6 s for one half, where 1 s was thought for all
    at("b", 0.75)
    at("b", 0.25)
    assert [left for *_, left in seen[2:4]] == [pytest.approx(6.0), pytest.approx(8 / 3)]
    shares = [share for _, share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] < 1


def test_little_says_nothing_of_the_rest():
    at, seen = stages([0.0, 1.0], {"a": 5, "b": 95})
    at("a")
    at("b")
    assert seen[-1] == ("b", 0.05, None)


def test_costs_are_taken_from_the_work_where_none_are_known():
    at, seen = stages([0.0, 1.0], {})
    with progress.staged(at, {"a": 1, "b": 1}) as say:
        say("a")
        say("b")
    assert seen[-1] == ("b", 0.5, 1.0)
    with progress.staged(at, {"c": 1}) as say:
        assert say is at
    assert seen[-1][1] == 0.5


def test_a_function_is_told_the_name_of_each_stage_once():
    told = []
    with progress.staged(told.append, {"a": 1, "b": 2}) as say:
        for part in (0.0, 0.5, 0.9):
            say("a", part)
        say("b")
    assert told == ["a", "b"]


def test_lines_of_stages_say_the_share(capsys):
    now = iter([0.0, 12.0, 24.0])
    lines = progress.Lines(lambda: next(now))
    lines("b", share=0.25, left=36.0)
    lines("b", share=0.4)
    said = capsys.readouterr().err.splitlines()
    assert said == ["b 25%, 12 s, 36 s left", "b 40%, 24 s, 18 s left"]


def test_pieces_of_different_size_are_counted_by_their_share_of_the_work(capsys):
    now = iter([0.0, 0.0, 12.0, 24.0, 36.0])
    lines = progress.Lines(lambda: next(now))
    lines("measuring", 0, 300, share=0.0)
    lines("measuring", 1, 300, share=0.05)  # too little to go by
    lines("measuring", 2, 300, share=0.5)
    lines("drawing", 3, 4)  # begun when nothing else was
    assert capsys.readouterr().err.splitlines() == [
        "measuring 5%, 12 s",
        "measuring 50%, 24 s, 24 s left",
        "drawing 3 of 4, 36 s, 4 s left",
    ]


@pytest.mark.parametrize("memory", [True, False])
def test_every_stage_of_an_audit_has_a_cost(memory):
    shares, names = [], []

    def show(stage, share=None, left=None):
        names.append(stage)
        shares.append(share)

    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    at = progress.Stages(show, {})
    osp.audit(net.to("cpu" if memory else "meta"), torch.rand(4, 3), progress=at)
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] > 0.1
    known = (
        STAGES if memory else ["following the operations", "looking at rows, columns and channels"]
    )
    assert list(dict.fromkeys(names)) == list(known)
    if memory:
        assert names.count("certifying rows, columns and channels") > 5


@pytest.mark.parametrize("terminal", [True, False])
def test_an_audit_and_an_evaluation_show_themselves(terminal, monkeypatch, capsys):
    consoles = lambda **_: Console(stderr=True, force_terminal=terminal, width=100)  # noqa: E731
    monkeypatch.setattr(progress, "Console", consoles)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    net, x = torch.nn.Linear(3, 2), torch.rand(4, 3)
    osp.audit(net, x, progress=True)
    said = capsys.readouterr().err
    assert re.search(r"looking for finer spheres and shifts .*\d\d%", said)
    osp.robustness.evaluate(
        net, (x, net(x).argmax(1)), eps=0.01, attacks="apgd-ce", checks=False, progress=True
    )
    assert "apgd-ce" in capsys.readouterr().err
    osp.audit(net, x)
    assert capsys.readouterr() == ("", "")
