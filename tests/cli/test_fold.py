"""`onsphere fold` in this process: what it writes, says and refuses."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
"""
FOLD = ["fold", "a.safetensors", "b.safetensors", "--model", "nets.py:net", "--input", "2x3x6x6"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a network and its weights, which it returns."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    made = net()
    with torch.no_grad():
        made[1].weight.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0]))
        made[1].running_mean.copy_(torch.tensor([0.1, 0.2, -0.3, 0.0]))
        made[1].running_var.copy_(torch.tensor([2.0, 0.5, 1.0, 4.0]))
    save_file(made.state_dict(), tmp_path / "a.safetensors", {"author": "someone"})
    return tmp_path


def output(path, x):
    made = net()
    made.load_state_dict(load_file(path))
    return made(x)


def test_the_file_loads_into_the_same_class(command, folder):
    code, out, _ = command(*FOLD)
    assert code == 0
    assert out.startswith("b.safetensors: 6 tensors\nnorms with running statistics: 1 of 1 folded")
    x = torch.randn(2, 3, 6, 6)
    old, new = (output(folder / f"{n}.safetensors", x) for n in "ab")
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)
    assert torch.equal(load_file(folder / "b.safetensors")["1.weight"], torch.ones(4))
    with safe_open(folder / "b.safetensors", "pt") as file:
        assert file.metadata() == {"author": "someone"}


def test_json_says_what_was_folded(command, folder):
    done = json.loads(command(*FOLD, "--json")[1])
    (part,) = done["folded"]
    assert (part["name"], part["kind"], part["into"]) == ("1", "batchnorm", ["0"])
    assert done["change"] < 1e-5


def test_a_page_shows_the_weights_before_and_after(command, folder):
    code, out, _ = command(*FOLD, "--html", "page.html")
    assert code == 0
    assert "Page: page.html" in out
    page = (folder / "page.html").read_text()
    assert "Ranges of output channels before and after" in page
    assert "Sizes of entries before and after" in page
    assert "0.weight" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train"], "'1' is in training mode"),
        (["--tolerance", "1e-30"], "accept it with a larger --tolerance"),
        (["--what", "norms"], "--what"),
        (["--input", "2x5x6x6"], "module '0'"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(command, folder, words, said):
    code, _, error = command(*FOLD, *words)
    assert code == 2
    assert said in error
    assert not (folder / "b.safetensors").exists()


def test_an_output_that_exists_is_kept(command, folder):
    (folder / "b.safetensors").write_text("mine")
    code, _, error = command(*FOLD)
    assert (code, error.count("\n")) == (2, 1)
    assert "'b.safetensors' is there already" in error
    assert (folder / "b.safetensors").read_text() == "mine"
    assert command(*FOLD, "--force")[0] == 0
