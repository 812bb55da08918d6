"""`onsphere equalize` in this process: what it writes, says and refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
"""
WORDS = ["a.safetensors", "b.safetensors", "--model", "nets.py:net", "--input", "2x3x6x6"]
EQUALIZE = ["equalize", *WORDS]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a network of uneven channels and its weights, which it returns."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    made = net()
    with torch.no_grad():
        made[0].weight.mul_(torch.logspace(-1, 1, 6).reshape(6, 1, 1, 1))
    save_file(made.state_dict(), tmp_path / "a.safetensors")
    return tmp_path


def net():
    names: dict = {}
    exec(NETS, names)
    return names["net"]()


def loaded(path):
    made = net()
    made.load_state_dict(load_file(path))
    return made


def test_the_file_holds_the_same_function_with_equal_ranges(command, folder):
    code, out, _ = command(*EQUALIZE)
    assert code == 0
    assert out.startswith("b.safetensors: 6 tensors\n2 families of channels rescaled, 3 weights")
    old, new = (loaded(folder / f"{n}.safetensors") for n in "ab")
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(new(x), old(x), rtol=1e-5, atol=1e-5)
    written, read = (new[i].weight.detach().abs().flatten(1).amax(1) for i in (0, 2))
    torch.testing.assert_close(written, read)


def test_json_and_the_page_say_what_was_done(command, folder):
    pytest.importorskip("matplotlib")
    words = [*EQUALIZE, "--objective", "Quantization", "--bits", "4", "--html", "page.html"]
    done = json.loads(command(*words, "--json")[1])
    assert (done["objective"], done["bits"], done["grid"]) == ("quantization", 4, "tensor")
    assert done["modes"] == ["train", "eval"]
    assert {w["name"] for w in done["weights"]} <= {"0.weight", "2.weight", "4.weight"}
    assert sum(w["loss_after"] for w in done["weights"]) < sum(
        w["loss_before"] for w in done["weights"]
    )
    page = (folder / "page.html").read_text()
    assert "Ranges of output channels before and after" in page
    assert "lost by int4" in page


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--bits", "40"], "bits is a whole number from 2 to 16, got 40"),
        (["--grid", "columns"], "grid is 'tensor', 'channel' or a number"),
        (["--objective", "best"], "--objective"),
        (["--input", "2x5x6x6"], "channels"),
        (["--html", "."], "folder"),
        (["--tolerance", "0"], "the model is left as it was"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_file(command, folder, more, words):
    code, _, err = command(*EQUALIZE, *more)
    assert code == 2
    assert words in err
    assert not (folder / "b.safetensors").exists()


def test_a_file_that_is_there_stays(command, folder):
    (folder / "b.safetensors").write_text("mine")
    code, _, err = command(*EQUALIZE)
    assert code == 2
    assert "--force" in err
    assert (folder / "b.safetensors").read_text() == "mine"
