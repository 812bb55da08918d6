"""`onsphere attack` in this process: what it prints, writes and refuses, on a tiny network."""

import json
import shlex
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from onsphere import cli
from onsphere.cli import attack
from onsphere.cli.common import data
from onsphere.cli.common.data import labelled
from onsphere.cli.common.parser import Parser
from onsphere.errors import OnsphereError
from onsphere.robustness.classifier import Classifier

NETS = """
import torch
from torch import nn

class Named(dict):
    @property
    def logits(self):
        return self["logits"]

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return Named(logits=self.inner(x))

class Pair(nn.Module):
    def forward(self, x):
        return x, x

class Lone(nn.Module):
    def forward(self, x):
        return x.flatten(1).sum(1)

class Cut(nn.Module):
    def forward(self, x):
        return x.detach().flatten(1)

def net():
    print("printed by the user's own code")
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 3),
    )

def wrapped(): return Wrapped()
def pair(): return Pair()
def lone(): return Lone()
def cut(): return Cut()
def half(): return net().half()
def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
"""


def examples():
    """Images 4x4 of three classes, brighter in a corner of their own."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(12) % 3
    x = 0.3 * torch.rand(12, 1, 4, 4, generator=generator)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 2 * (label // 2) : 2 * (label // 2) + 2, 2 * (label % 2) : 2 * (label % 2) + 2] += (
            0.6
        )
    return x, y


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run the command line beside nets.py and test.npz; return exit code, output, error output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    x, y = examples()
    np.savez("test.npz", x=x.numpy(), y=y.numpy())

    def run(*words):
        try:
            code = cli.main(["attack", *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def checkpoint(command, capsys):
    """A trained network in the command's folder, in training's own format."""
    scope = {}
    exec(NETS, scope)
    net, (x, y) = scope["net"](), examples()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    torch.save({"state_dict": {f"module.{n}": t for n, t in net.state_dict().items()}}, "net.pt")
    capsys.readouterr()
    return "net.pt"


QUICK = ("--data", "test.npz", "--quick", "--images", 4)


def test_it_prints_accuracies_checks_and_gains(command, checkpoint, tmp_path):
    words = ("nets.py:net", "--checkpoint", checkpoint, "--eps", "1/20", *QUICK)
    code, out, error = command(*words, "--html", "page.html")
    assert (code, error) == (0, "printed by the user's own code\n")
    for part in (
        "Robust accuracy of 4 examples, linf, eps = 0.05", "no attack", "apgd-ce", "apgd-t",
        "can it be trusted?", "What Sequential does to perturbations", "scale-dependent",
        "Page: page.html",
    ):  # fmt: skip
        assert part in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for part in (
        "Sequential under attack", "A quick run", "Gain against depth", "test.npz",
        "onsphere attack nets.py:net --data test.npz --checkpoint net.pt --eps 0.05",
    ):  # fmt: skip
        assert part in page


def test_json_holds_both_parts_and_nothing_else_is_printed(command, checkpoint):
    words = ("nets.py:net", "--checkpoint", checkpoint, "--eps", 0.05, "--norm", "l2", *QUICK)
    code, out, _ = command(*words, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (code, found["model"], found["data"], found["notes"]) == (
        0,
        "Sequential",
        "test.npz",
        ["Names of the checkpoint read without 'module.', the prefix of data parallelism."],
    )
    assert found["evaluation"]["settings"]["norm"] == "l2"
    assert found["evaluation"]["clean_accuracy"]["value"] == 1
    gains = found["amplification"]
    assert [layer["name"] for layer in gains["layers"]] == ["0", "1", "2", "3", "4"]
    assert gains["control"]["change"] == 0
    assert "absolute" in gains["layers"][0]["bookkeeping"]
    assert all("relative" not in layer["bookkeeping"] for layer in gains["layers"])


def test_full_gives_up_on_no_example(command, checkpoint, tmp_path):
    words = ("nets.py:net", "--checkpoint", checkpoint, "--data", "test.npz", "--images", 2)
    words = (*words, "--eps", 0.05, "--html", "page.html")
    code, out, _ = command(*words, "--full", "--json")
    budget = json.loads(out)["evaluation"]["settings"]
    assert (code, budget["early_stopping"], budget["queries"]) == (0, False, 5000)
    assert "--full" in (tmp_path / "page.html").read_text(encoding="utf-8")
    code, _, error = command(*words, "--full", "--quick")
    assert code == 2
    assert "not allowed with argument --full" in error


def test_a_normalization_goes_inside_the_model(command, checkpoint):
    """The same function of other units: the same accuracies, and layers under the same names."""
    x, y = examples()
    np.savez("moved.npz", x=4 * x.numpy() - 1, y=y.numpy())
    words = ("nets.py:net", "--checkpoint", checkpoint, "--quick", "--images", 4, "--json")
    plain = json.loads(command(*words, "--data", "test.npz", "--eps", 0.05)[1])
    moved = command(
        *words, "--data", "moved.npz", "--eps", 0.2, "--bounds", -1, 3, "--mean", -1, "--std", 4
    )
    found = json.loads(moved[1])
    assert found["evaluation"]["fates"] == plain["evaluation"]["fates"]
    ours, theirs = (
        [layer["name"] for layer in r["amplification"]["layers"]] for r in (found, plain)
    )
    assert ours == theirs


def test_a_model_in_half_precision_is_attacked_in_float32(command):
    options = parsed("nets.py:half", "--eps", "0.1", "--data", "test.npz")
    subject = attack._subject(options, labelled("test.npz", options.data_dir))
    assert torch.equal(subject.x, examples()[0])
    assert subject.model(subject.x[:2]).dtype == torch.float16


def test_a_classifier_rounds_where_the_model_begins():
    x = torch.rand(2, 1, 4, 4)
    model = Classifier(torch.nn.Flatten(), mean=[0.5], dtype=torch.float16)
    assert torch.equal(model(x), (x - 0.5).half().flatten(1))


@pytest.mark.parametrize("change", [{"mean": [np.nan]}, {"std": [1.0, np.nan]}, {"std": [np.inf]}])
def test_a_classifier_takes_finite_numbers(change):
    with pytest.raises(ValueError, match="finite, got"):
        Classifier(torch.nn.Flatten(), **change)


def parsed(*words):
    parser = Parser()
    attack.add(parser.add_subparsers(parser_class=Parser))
    return parser.parse_args(["attack", *words])


def test_the_command_of_the_page_finds_the_data_again():
    def words(*given):
        return shlex.split(attack._command(parsed("a.py:b", *given)))

    again = words("--eps", "0.1", "--data", "mnist", "--data-dir", "my data")
    assert again[again.index("--data-dir") + 1] == "my data"
    assert "--data-dir" not in words("--eps", "0.1", "--data", "mnist")
    assert "--data-dir" not in words("--eps", "0.1", "--data", "a.npz", "--data-dir", "d")


def test_logits_are_found_in_what_a_model_returns(command):
    code, out, _ = command("nets.py:wrapped", "--eps", 0.01, *QUICK)
    assert code == 0
    assert "inner.0" in out


def test_without_scale_symmetry_there_is_no_control_and_it_is_said(command):
    code, out, _ = command("nets.py:flat", "--eps", 0.01, *QUICK)
    assert code == 0
    assert "No control of scales: the model has no scale symmetry" in out


def test_the_control_of_norms_moves_no_singular_value(command, checkpoint):
    words = ("nets.py:net", "--checkpoint", checkpoint, "--eps", 0.05, *QUICK, "--json")
    found = json.loads(command(*words, "--control", "norms")[1])
    moved = {m for layer in found["amplification"]["layers"] for m in layer["bookkeeping"]}
    assert moved == {"absolute", "incremental", "weight_norm"}


def test_help_has_examples(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "examples:\n  onsphere attack net.py:Net --checkpoint" in out


MISTAKES = {
    "eps is 0": (["nets.py:net", "--eps", 0], ["--eps must be positive", "got 0"]),
    "eps is negative": (["nets.py:net", "--eps=-0.1"], ["--eps must be positive", "got -0.1"]),
    "eps in words": (["nets.py:net", "--eps", "small"], ["--eps", "'small' is no number"]),
    "no eps": (["nets.py:net"], ["--eps"]),
    "no images": (["nets.py:net", "--eps", 1, "--images", 0], ["--images must be at least 1"]),
    "no draws": (["nets.py:net", "--eps", 1, "--draws", 0], ["--draws must be at least 1, got 0"]),
    "bounds in disorder": (
        ["nets.py:net", "--eps", 1, "--bounds", 1, 0],
        ["--bounds are the least and the greatest value, got 1 0"],
    ),
    "a spread of 0": (["nets.py:net", "--eps", 1, "--std", 0], ["--std must be positive"]),
    "means of other channels": (
        ["nets.py:net", "--eps", 1, "--mean", 0, 0, 0],
        ["--mean takes one number, or one for each of 1 channels: got 3"],
    ),
    "outside bounds": (
        ["nets.py:net", "--eps", 0.1, "--bounds", 0, 0.5],
        ["inputs lie in", "outside --bounds", "normalization inside the model"],
    ),
    "bounds without end": (
        ["nets.py:net", "--eps", 1, "--bounds", 0, "inf"],
        ["--bounds must be finite, got 0 inf"],
    ),
    "a fraction beyond floats": (["nets.py:net", "--eps", f"1{400 * '0'}/3"], ["is no number"]),
    "a mean that is no number": (
        ["nets.py:net", "--eps", 1, "--mean", "nan"],
        ["--mean must be finite"],
    ),
    "a spread that is no number": (
        ["nets.py:net", "--eps", 1, "--std", "nan"],
        ["--std must be positive"],
    ),
    "no gradient": (["nets.py:cut", "--eps", 0.1], ["output carries no gradient to its input"]),
    "a checkpoint without names": (
        ["nets.py:net", "--eps", 1, "--checkpoint", "unnamed.pt"],
        ["'unnamed.pt' must hold tensors by name: 1 is no name"],
    ),
    "data without names": (
        ["nets.py:net", "--eps", 1, "--data", "unnamed.pt"],
        ["'unnamed.pt' must hold tensors by name: 1 is no name"],
    ),
    "no such target": (["nets.py:nett", "--eps", 1], ["has no 'nett'", "did you mean 'net'?"]),
    "no such checkpoint": (
        ["nets.py:net", "--eps", 1, "--checkpoint", "a.pt"],
        ["there is no checkpoint 'a.pt'"],
    ),
    "a checkpoint of another model": (
        ["nets.py:net", "--eps", 1, "--checkpoint", "other.safetensors"],
        ["does not match Sequential", "7 tensors missing", "2 unexpected"],
    ),
    "no logits": (["nets.py:pair", "--eps", 1], ["Pair returned tuple, not logits"]),
    "one number per example": (["nets.py:lone", "--eps", 1], ["shape (batch, classes)", "(2,)"]),
    "another input": (
        ["nets.py:net", "--eps", 1, "--data", "wide.npz"],
        ["Sequential raised RuntimeError on inputs of shape 1×5×5"],
    ),
    "labels out of range": (
        ["nets.py:net", "--eps", 1, "--data", "labels.npz"],
        ["labels lie in [0, 7], but the model has 3 classes"],
    ),
    "no such data": (["nets.py:net", "--eps", 1, "--data", "minst"], ["did you mean 'mnist'?"]),
    "no such file": (["nets.py:net", "--eps", 1, "--data", "a.npz"], ["there is no file 'a.npz'"]),
    "a page that is a folder": (["nets.py:net", "--eps", 1, "--html", "."], ["it is a folder"]),
    "unknown norm": (["nets.py:net", "--eps", 1, "--norm", "l7"], ["--norm", "'l7'"]),
}


@pytest.mark.parametrize(("words", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(command, words, says):
    x, y = examples()
    save_file({"a": x, "b": x + 1}, "other.safetensors")
    torch.save({"x": x, 1: y}, "unnamed.pt")
    np.savez("wide.npz", x=np.zeros((3, 1, 5, 5), np.float32), y=np.zeros(3, int))
    np.savez("labels.npz", x=x.numpy(), y=np.where(y == 2, 7, y))
    data = [] if "--data" in words else ["--data", "test.npz"]
    code, out, error = command(*words, *data)
    error = error.replace("printed by the user's own code\n", "")
    assert (code, out, error.count("\n")) == (2, "", 1)
    for part in says:
        assert part in error


# --- files of examples ----------------------------------------------------------------------


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_of_every_kind_hold_the_same(folder):
    x, y = examples()
    np.savez("a.npz", x=x.numpy(), y=y.numpy(), more=np.zeros(2))
    save_file({"x": x, "y": y}, "a.safetensors")
    torch.save({"x": x, "y": y}, "a.pt")
    for name in ("a.npz", "a.safetensors", "a.pt"):
        found = labelled(name, folder)
        assert found.name == name
        assert torch.equal(found.x, x)
        assert torch.equal(found.y, y)


def test_bytes_become_numbers_up_to_one(folder):
    np.savez("a.npz", x=np.full((2, 1, 2, 2), 255, np.uint8), y=np.zeros(2, np.uint8))
    found = labelled("a.npz", folder)
    assert torch.equal(found.x, torch.ones(2, 1, 2, 2))
    assert found.y.dtype == torch.long


def test_a_data_set_gives_its_test_images(folder):
    pytest.importorskip("sklearn")
    assert labelled("digits", folder).x.shape == (500, 1, 8, 8)


BAD_FILES = {
    "other names": ({"images": np.zeros((2, 2))}, "must hold x (inputs) and y (labels)"),
    "labels that are no integers": ({"x": np.zeros((2, 2)), "y": np.zeros(2)}, "float64"),
    "fewer labels": ({"x": np.zeros((2, 2)), "y": np.zeros(1, int)}, "one label per input"),
    "nothing": ({"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, "one label per input"),
    "integers": ({"x": np.zeros((2, 2), int), "y": np.zeros(2, int)}, "floating point or bytes"),
    "NaN": ({"x": np.full((2, 2), np.nan), "y": np.zeros(2, int)}, "NaN or infinity"),
    "code": ({"x": np.array([{}, {}]), "y": np.zeros(2, int)}, "no file of arrays"),
}


@pytest.mark.parametrize(("arrays", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_hold_something_else(folder, arrays, says):
    np.savez("a.npz", **arrays)
    with pytest.raises(OnsphereError, match=says.replace("(", r"\(").replace(")", r"\)")):
        labelled("a.npz", folder)


@pytest.mark.parametrize("name", ["a.npz", "a.pt", "a.safetensors", "a.png"])
def test_files_of_another_kind(folder, name):
    (folder / name).write_bytes(b"no such thing")
    with pytest.raises(OnsphereError, match=name) as raised:
        labelled(name, folder)
    assert "\n" not in str(raised.value)


def test_a_classifier_keeps_state_and_mode_of_its_model():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3)).eval()
    made = Classifier(net, mean=[0.0, 1.0, 2.0], std=[2.0])
    assert not made.training
    assert set(made.state_dict()) == {f"model.{n}" for n in net.state_dict()}
    x = torch.rand(2, 3, 4, 4)
    expected = net((x - torch.arange(3.0).reshape(3, 1, 1)) / 2)
    assert torch.equal(made(x), expected)


def test_an_eps_as_wide_as_the_box_is_refused(command, checkpoint):
    code, _, error = command(
        "nets.py:net", "--checkpoint", checkpoint, "--data", "test.npz", "--eps", "8"
    )
    assert code == 2
    assert "--eps 8 reaches across the whole box between 0 and 1" in error


def test_names_of_norms_and_of_data_may_have_capitals(command, checkpoint):
    code, out, _ = command(
        "nets.py:net",
        "--checkpoint",
        checkpoint,
        "--data",
        "test.npz",
        "--eps",
        "0.01",
        "--norm",
        "Linf",
        "--quick",
        "--json",
    )
    assert code == 0
    assert json.loads(out)["evaluation"]["settings"]["norm"] == "linf"


def test_a_network_that_guesses_is_said(command):
    _, out, _ = command(
        "nets.py:net", "--data", "test.npz", "--eps", "0.01", "--quick", "--images", "1e1"
    )
    assert "as by guessing among 3 classes. The network looks untrained" in out


def test_test_images_do_not_need_the_training_file(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    with pytest.raises(OnsphereError, match=r"t10k-images-idx3-ubyte.gz"):
        labelled("MNIST", tmp_path)


def test_an_npz_with_a_damaged_header_is_one_line(tmp_path):
    damaged = tmp_path / "damaged.npz"
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': (\n")  # cut short
        archive.writestr("y.npy", b"")
    with pytest.raises(OnsphereError, match=r"damaged.npz' is no file of arrays: ") as raised:
        data._npz(damaged)
    assert "\n" not in str(raised.value)
