"""`onsphere plan` in this process: what it prints, writes and refuses."""

import json
import re
import shlex

import pytest
from torch.optim import SGD

from onsphere.planning import Schedule
from planning.watched import watched, write

ADAMW = ["plan", "adamw", "--lr", "1e-3", "--weight-decay", "0.1", "--steps", "20000"]


def planned(*words: str) -> list[str]:
    return [*ADAMW, *words]


def test_what_is_printed(command):
    code, out, error = command(*planned("--schedule", "cosine", "--batch", "32"))
    assert (code, error) == (0, "")
    assert out.startswith("adamw, lr 0.001, weight decay 0.1, betas 0.9 0.999, batch 32: 20,000")
    assert re.search(r"rotation +0\.00324 +radians per step", out)
    assert re.search(r"half-life +3,466 +steps", out)
    assert re.search(r" +110,904 +examples", out)
    assert "Hardly long enough to settle: the run lasts 2.9 half-lives" in out
    assert "osp.optim.SphereAdamW" in out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("┤") == 9


def test_without_decay_the_growth_is_shown(command):
    code, out, _ = command("plan", "sgd", "--lr", 0.1, "--weight-decay", 0, "--steps", 500)
    assert code == 0
    assert "EQUILIBRIUM" not in out
    assert "t^(1/4)" in out
    assert "ON THE SPHERE" not in out


def test_json_is_the_plan(command):
    code, out, _ = command(*planned("--json"))
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0
    assert found["equilibrium"]["half_life"] == pytest.approx(3465.736)
    assert found["path"]["rotation"][-1] == pytest.approx(found["equilibrium"]["rotation"])
    assert found["path"]["step"][-1] == 19_999
    assert found["code"][1].startswith("recipe = ")


def test_json_without_decay_has_no_infinity(command):
    code, out, _ = command("plan", "adam", "--lr", 0.1, "--weight-decay", 0, "--steps", 9, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0
    assert found["equilibrium"] is None
    assert found["path"]["rotation"][0] is None


def test_the_page_is_written(command, tmp_path):
    code, out, _ = command(*planned("--schedule", "wsd", "--html", "pages/plan.html"))
    page = (tmp_path / "pages" / "plan.html").read_text(encoding="utf-8")
    assert code == 0
    assert out.endswith("Page: pages/plan.html\n")
    assert page.count('role="img"') == 3
    assert "<code>groups = audit.param_groups(model, weight_decay=0.1)\n" in page
    assert "onsphere plan adamw --lr 0.001 --weight-decay 0.1 --steps 20000 --schedule wsd" in page


def test_the_examples_of_the_help_are_plans(command):
    code, out, _ = command("plan", "--help")
    assert code == 0
    examples = out.partition("examples:")[2].partition("OPTIMIZER is")[0].replace("\\\n", " ")
    lines = [line for line in examples.splitlines() if "--from" not in line and line.strip()]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        if not words:
            continue
        assert command(*words)[0] == 0


@pytest.fixture
def run(tmp_path):
    settings = {"lr": 0.1, "weight_decay": 0.05}
    path = tmp_path / "run.jsonl"
    return write(watched("sgd", SGD, settings, Schedule(60), initial_norm=2.0), path)


def test_a_watched_run_is_compared(command, run, tmp_path):
    code, out, error = command("plan", "--from", run.name, "--html", "run.html")
    assert (code, error) == (0, "")
    assert re.search(r"walk +0\.\d+ +0\.\d+ +[+-]\d", out)
    assert "1 of 1 layers turn within 15%" in out
    assert max(map(len, out.splitlines())) <= 80
    assert (tmp_path / "run.html").read_text(encoding="utf-8").count('role="img"') == 2
    code, out, _ = command("plan", "--from", run.name, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert abs(found["layers"]["walk"]["rotation_off"]) < 0.1
    assert found["layers"]["dead"]["rotation"] is None
    assert found["layers"]["other"]["law"] is None


MISTAKES = {
    "no optimizer": (["plan"], ["OPTIMIZER is missing"]),
    "no rate": (["plan", "sgd", "--steps", "9"], ["--lr is missing"]),
    "no decay": (["plan", "sgd", "--lr", "1", "--steps", "9"], ["--weight-decay is missing"]),
    "no steps": (ADAMW[:-2], ["--steps is missing"]),
    "unknown optimizer": (["plan", "adamww", *ADAMW[2:]], ["'adamww'", "did you mean 'adamw'?"]),
    "unknown schedule": (planned("--schedule", "cosin"), ["'cosin'", "did you mean 'cosine'?"]),
    "negative rate": (["plan", "sgd", "--lr=-1", *ADAMW[4:]], ["lr is a positive number"]),
    "rate in words": (["plan", "sgd", "--lr", "big", *ADAMW[4:]], ["--lr", "'big'"]),
    "rate times decay": (["plan", "adamw", "--lr", "20", *ADAMW[4:]], ["must be below 1"]),
    "betas out of range": (planned("--betas", "0.9,1"), ["betas are two numbers", "1.0"]),
    "one beta": (planned("--betas", "0.9"), ["--betas takes two numbers", "'0.9'"]),
    "betas in words": (planned("--betas", "a,b"), ["--betas takes two numbers", "'a,b'"]),
    "momentum of adamw": (planned("--momentum", "0.9"), ["adamw has no momentum"]),
    "decoupled adamw": (planned("--decoupled"), ["adamw has no decoupled"]),
    "no steps left": ([*ADAMW[:-1], "0"], ["at least 1 step, got 0"]),
    "all warmup": (planned("--warmup", "20000"), ["less than the 20000"]),
    "drops without steps": (planned("--drops", "5"), ["constant schedule has no drops"]),
    "drops in words": (planned("--schedule", "step", "--drops", "a"), ["--drops", "'a'"]),
    "shape in words": (planned("--shape", "3xmany"), ["'3xmany' is no shape"]),
    "no entries": (planned("--shape", "0"), ["sides of at least 1"]),
    "gradients of adamw": (planned("--gradient-square", "2"), ["nothing under adamw depends"]),
    "no batch": (planned("--batch", "0"), ["at least 1 example"]),
    "initial norm": (planned("--initial-norm", "nan"), ["initial norm is above 0"]),
    "a page that is a folder": (planned("--html", "."), ["it is a folder"]),
    "no such run": (["plan", "--from", "nowhere.jsonl"], ["nowhere.jsonl cannot be read"]),
    "a run and a rate": (["plan", "--from", "a", "--lr", "1"], ["--lr cannot be given"]),
    "a run and an optimizer": (["plan", "sgd", "--from", "a"], ["an OPTIMIZER cannot be given"]),
}


@pytest.mark.parametrize(("words", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_leaves_nothing(command, tmp_path, words, says):
    code, out, error = command(*words)
    assert (code, out) == (2, "")
    assert error.startswith("onsphere")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    for part in says:
        assert part in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{}\n", "rubbish\n", '{"kind": "onsphere-run"}\n'])
def test_a_file_that_is_no_run(command, tmp_path, content):
    (tmp_path / "run.jsonl").write_text(content)
    code, out, error = command("plan", "--from", "run.jsonl")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "run.jsonl holds no watched run" in error


@pytest.mark.parametrize(
    "words",
    [
        ("--lr", "1e-200", "--weight-decay", "1e-200"),
        ("--lr", "1e-3", "--weight-decay", "1e-320", "--json"),
    ],
)
@pytest.mark.parametrize("method", ["sgd", "adamw", "muon"])
def test_numbers_beyond_floating_point_are_one_line(method, words, command):
    code, out, error = command("plan", method, *words, "--steps", "10")
    assert (code, out) == (2, "")
    assert "too small to compute with" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [("--cooldown", "0.3"), ("--drop-by", "3"), ("--steps", "9" * 30), ("--batch", "9" * 30)],
)
def test_options_that_the_plan_does_not_take_are_refused(words, command):
    code, out, error = command(*planned(*words))
    assert (code, out) == (2, "")
    assert error.count("\n") == 1


def test_names_and_numbers_as_people_write_them(command):
    said = [
        command("plan", *words.split(), "--json")
        for words in (
            "adamw --lr 1e-3 --weight-decay 0.1 --steps 100000 --betas 0.9,0.95 --schedule cosine",
            "AdamW --lr 1e-3 --weight-decay 0.1 --steps 1e5 --betas 0.9 0.95 --schedule Cosine",
        )
    ]
    assert said[0] == said[1]
    assert said[0][0] == 0
