"""The file of a watched run: what is written is read, and what is broken is said."""

import dataclasses
import json

import numpy as np
import pytest

from onsphere.monitor.run import (
    COUNTS,
    PREDICTIONS,
    QUANTITIES,
    STATISTICS,
    Flag,
    Run,
    RunError,
    Sample,
    flag_line,
)

LAYERS = {"a.weight": {"vectors": 4}, "b": {"vectors": 1}}


def sample(step, seed=0):
    generator = np.random.default_rng(seed + step)
    draw = generator.standard_normal
    return Sample(
        step,
        np.array([0.1, 0.2]),
        draw((2, len(QUANTITIES), len(STATISTICS))),
        generator.integers(0, 4, (2, len(COUNTS))).astype(float),
        draw((2, len(PREDICTIONS))),
    )


def run_of(*samples, flags=()):
    return Run({"name": "SGD", "lr": 0.1}, LAYERS, list(samples), list(flags), 10, {"torch": "x"})


def lines_of(run, start=0):
    return [
        run.header(start),
        *map(run.sample_line, run.samples),
        *map(flag_line, run.flags),
    ]


def written(path, *lines, end="\n"):
    path.write_text("\n".join(lines) + end)
    return path


def test_what_is_written_is_read(tmp_path):
    flag = Flag("dead", "b", 10, "no gradient")
    run = run_of(sample(0), sample(10), flags=[flag])
    got = Run.read(written(tmp_path / "run.json", *lines_of(run)))
    assert got.steps.tolist() == [0, 10]
    assert (got.optimizer, got.layers, got.flags) == (run.optimizer, LAYERS, [flag])
    assert (got.every, got.versions) == (10, {"torch": "x"})
    for ours, theirs in zip(run.samples, got.samples, strict=True):
        for name in ("lrs", "values", "counts", "predicted"):
            np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=1e-5)
    assert got.series("b", "radial", "q50")[1] == pytest.approx(run.samples[1].values[1, 4, 2])
    assert got.predicted("b", "half_life")[0] == pytest.approx(run.samples[0].predicted[1, 4], 1e-5)
    assert got.lr("b").tolist() == [0.2, 0.2]


def test_what_is_not_finite_is_strict_json_and_read_as_nan(tmp_path):
    spoiled = sample(0)
    spoiled.values[0, 0, 0], spoiled.predicted[1, 1] = np.inf, np.nan
    run = run_of(spoiled)
    text = run.sample_line(spoiled)
    assert "NaN" not in text
    assert "Infinity" not in text
    got = Run.read(written(tmp_path / "run.json", *lines_of(run)))
    assert np.isnan(got.samples[0].values[0, 0, 0])
    assert np.isnan(got.samples[0].predicted).sum() == 1


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_torn_last_line_is_left_out(tmp_path, left):
    first, *rest = lines_of(run_of(sample(0), sample(10)))
    path = written(tmp_path / "run.json", first, rest[0], rest[1][:left], end="")
    assert Run.read(path).steps.tolist() == [0]


def test_a_resumed_run_replaces_what_it_did_again(tmp_path):
    early = run_of(sample(0), sample(10), sample(20), flags=[Flag("dead", "b", 20, "gone")])
    late = run_of(sample(10, seed=7), sample(20, seed=7))
    path = written(tmp_path / "run.json", *lines_of(early), *lines_of(late, start=10))
    got = Run.read(path)
    assert got.steps.tolist() == [0, 10, 20]
    assert got.flags == []
    expected = late.samples[0].values[0, 0, 0]
    assert got.series("a.weight", "norm")[1] == pytest.approx(expected, 1e-5)


HEADER, LINE = lines_of(run_of(sample(0)))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "it is empty"),
        ([LINE], "line 1 is not a header"),
        (["[1]"], "line 1 is not an object"),
        (["nothing"], "line 1 is not JSON"),
        ([HEADER, LINE[:30], LINE], "line 2 is not JSON"),
        ([HEADER, '{"step": 3}'], "line 2 lacks or spoils 'layers'"),
        ([HEADER, LINE.replace('"norm"', '"form"')], "line 2 lacks or spoils 'norm'"),
        ([HEADER.replace('"version":1', '"version":9')], "version 9 of the format"),
        ([HEADER, HEADER.replace('"b"', '"c"')], "resumed with other layers"),
    ],
)
def test_broken_files_are_refused(tmp_path, lines, says):
    path = tmp_path / "run.json"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(RunError, match=says):
        Run.read(path)


def test_files_that_are_not_there_and_names_that_are_not_in_it(tmp_path):
    with pytest.raises(RunError, match="cannot be read: No such file"):
        Run.read(tmp_path / "none.json")
    run = run_of(sample(0))
    for ask in (
        lambda: run.series("a.wieght", "norm"),
        lambda: run.series("b", "form"),
        lambda: run.series("b", "norm", "median"),
        lambda: run.predicted("b", "gradient"),
    ):
        with pytest.raises(RunError, match="the run has no"):
            ask()
    assert json.loads(dataclasses.replace(run, every=3).header())["every"] == 3


def test_a_short_repr():
    run = Run({"name": "SGD"}, {f"layer {k}": {} for k in range(99)})
    assert repr(run) == "<Run of SGD: 99 layers, 0 samples, 0 flags>"


def test_a_notebook_shows_a_table():
    run = run_of(sample(0), sample(10), flags=[Flag("dead", "b", 10, "no <gradient>")])
    shown = run._repr_html_()
    assert "2 layers, 2 samples up to step 10, 1 flags" in shown
    assert shown.count("<tr>") == 3
    assert f"<td>a.weight</td><td>{run.series('a.weight', 'norm')[-1]:.4g}</td>" in shown
    assert "no &lt;gradient&gt;" in shown
    assert run_of()._repr_html_().count("<tr>") == 1
