"""The command line in this process: mistakes are one line, exit code 2, and change nothing."""

import argparse
import json
import runpy
import sys

import pytest

from onsphere.cli.common.parser import whole
from onsphere.version import __version__

MISTAKES = {
    "unknown claim": (["study", "grwth"], ["unknown claim 'grwth'", "did you mean 'growth'?"]),
    "one of two claims": (["study", "gain", "spheer"], ["'spheer'", "did you mean 'sphere'?"]),
    "nothing near": (["study", "xyzzy"], ["there are: sphere, invariance, growth"]),
    "unknown data": (["study", "--data", "minst"], ["data set 'minst'", "did you mean 'mnist'?"]),
    "missing data": (
        ["study", "--data", "mnist", "--data-dir", "nowhere"],
        ["train-images-idx3-ubyte.gz", "9,912,422 bytes", "f68b3c2dcbeaaa9fbdd348bbdeb94873"],
    ),
    "missing archive": (["study", "--data", "cifar10"], ["cifar-10-python.tar.gz", "170,498,071"]),
    "no seeds": (["study", "--seeds", "0"], ["at least one seed"]),
    "fewer than no seeds": (["study", "--seeds", "-2"], ["at least one seed"]),
    "seeds in words": (["study", "--seeds", "many"], ["--seeds", "'many'", "study --help"]),
    "a budget that is no time": (
        ["study", "--until-decided", "--budget", "soon"],
        ["--budget 'soon' is no time", "1h30m"],
    ),
    "a budget of nothing": (["study", "--until-decided", "--budget", "0h"], ["'0h' is no time"]),
    "a budget without rounds": (["study", "--budget", "2h"], ["is for --until-decided: add that"]),
    "no jobs": (["study", "--jobs", "0"], ["--jobs must be at least 1, got 0"]),
    "two sizes": (["study", "--quick", "--full"], ["--full", "not allowed with", "--quick"]),
    "unknown option": (["study", "--sedes", "3"], ["--sedes"]),
    "a negative rate": (
        ["plan", "adamw", "--lr", "-1e-3", "--weight-decay", "0.1", "--steps", "9"],
        ["--lr is a positive number, got -0.001"],
    ),
    "a negative fraction": (
        ["attack", "nets:net", "--data", "digits", "--eps", "-8/255"],
        ["--eps must be positive", "-0.03"],
    ),
    "no number among several": (
        ["attack", "--mean", "0.5,x", "nets:net", "--data", "digits", "--eps", "1"],
        ["--mean", "'x' is no number"],
    ),
    "unknown command": (["studdy"], ["'studdy'", "study"]),
}


@pytest.mark.parametrize(("words", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_leaves_nothing(command, tmp_path, words, says):
    code, out, error = command(*words)
    assert (code, out) == (2, "")
    assert error.startswith("onsphere")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    for part in says:
        assert part in error
    assert list(tmp_path.iterdir()) == []


def test_without_a_command_the_help_is_shown(command):
    code, out, error = command()
    assert (code, error) == (0, "")
    assert "usage: onsphere" in out
    assert "audit" in out


@pytest.mark.parametrize(
    "words",
    [
        ["--betas", "0.9", "0.95", "AdamW"],
        ["--betas", "0.9,0.95", "AdamW"],
        ["--betas", "0.9,", "0.95", "AdamW"],
        ["AdamW", "--betas", "0.9", "0.95"],
    ],
)
def test_several_numbers_end_before_a_word(command, words):
    rest = ["--lr", "1e-3", "--weight-decay", "0.1", "--steps", "1e4", "--json"]
    code, out, error = command("plan", *words, *rest)
    assert (code, error) == (0, "")
    assert json.loads(out)["betas"] == [0.9, 0.95]


def test_it_is_run_as_a_module_too(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["onsphere", "--version"])
    monkeypatch.delitem(sys.modules, "onsphere.__main__", raising=False)  # its doctests import it
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("onsphere", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"onsphere {__version__}\n"


@pytest.mark.parametrize(
    ("text", "value"), [("1e5", 100_000), ("100_000", 100_000), ("100,000", 100_000), ("7", 7)]
)
def test_whole_numbers_as_people_write_them(text, value):
    assert whole(text) == value


@pytest.mark.parametrize("text", ["1.5", "many", "1,5", "1e-3"])
def test_no_whole_number(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no whole number"):
        whole(text)


def test_a_truncated_data_file_is_named_with_what_it_should_be(command, tmp_path):
    name = "train-images-idx3-ubyte.gz"
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    (tmp_path / "data" / "mnist" / name).write_bytes(b"\x1f\x8b" * 50)
    code, out, error = command("study", "--data", "mnist")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert f"{name} has 100 bytes and md5" in error
    assert "9,912,422 bytes and md5 f68b3c2dcbeaaa9fbdd348bbdeb94873" in error
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_output_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, out, error = command("study", "--out", "file/results")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("onsphere: cannot write to the output folder 'file/results'")
    assert (tmp_path / "file").read_text() == "mine"


def test_records_of_another_version(command, tmp_path):
    (tmp_path / "results" / "records").mkdir(parents=True)
    (tmp_path / "results" / "records" / "format").write_text("99\n")
    code, out, error = command("study", "--quick")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "have format '99'" in error
    assert "choose another folder with --out" in error
    assert (tmp_path / "results" / "records" / "format").read_text() == "99\n"
    assert not list(tmp_path.glob("results/records/*.json"))


def fail_with(error):
    def study(*_, **__):
        raise error

    return study


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "onsphere: stopped; what had finished is kept"),
        (ModuleNotFoundError("", name="jinja2"), 2, 'jinja2: pip install "onsphere[study]"'),
    ],
    ids=["Ctrl-C", "extra missing"],
)
def test_what_stops_a_study_is_one_line(command, monkeypatch, error, code, says):
    monkeypatch.setattr("onsphere.studies.study.study", fail_with(error))
    found, out, text = command("study")
    assert (found, out, text.count("\n")) == (code, "", 1)
    assert says in text


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ModuleNotFoundError("", name="onsphere.nothing")]
)
def test_a_bug_of_ours_is_not_hidden(command, monkeypatch, error):
    monkeypatch.setattr("onsphere.studies.study.study", fail_with(error))
    with pytest.raises(type(error)):
        command("study")


def test_version(command):
    assert command("--version") == (0, f"onsphere {__version__}\n", "")


@pytest.mark.parametrize("words", [["study"], ["norms"]])
def test_help_has_examples(command, words):
    code, out, _ = command(*words, "--help")
    assert code == 0
    assert f"examples:\n  onsphere {words[0]}" in out


@pytest.mark.parametrize(
    "words", [[], ["audit"], ["canonicalize"], ["attack"], ["plan"], ["norms"], ["study"]]
)
def test_every_help_fits_a_terminal(command, words):
    code, out, _ = command(*words, "--help")
    assert code == 0
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_every_claim_is_in_the_help(command):
    from onsphere.studies.study import CLAIMS

    listed = command("study", "--help")[1].split("\nwhat the paper claims:\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines()] == list(CLAIMS)


def test_norms_prints_one_row_per_method(command, monkeypatch):
    from onsphere.norms import invariance_table

    monkeypatch.setenv("COLUMNS", "250")  # no name is broken over two lines
    code, out, error = command("norms", "--json")
    rows = json.loads(out, parse_constant=pytest.fail)
    assert (code, error) == (0, "")
    assert [row["name"] for row in rows] == [row.name for row in invariance_table()]
    code, out, error = command("norms")
    assert (code, error) == (0, "")
    assert all(row["name"].replace("normalization", "norm") in out for row in rows)
