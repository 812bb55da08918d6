"""`onsphere audit` and `canonicalize` in this process: what they print, write and refuse."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from onsphere.symmetry import Audit

NETS = """
import torch
from torch import nn

class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        if x.shape[0] == 7:
            raise ZeroDivisionError("seven rows are too many")
        return [1, 2] if x.shape[0] == 1 else self.inner(x)

def net():
    print("printed by the user's own code")
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5, bias=False), nn.ReLU(),
        nn.Linear(5, 2, bias=False),
    )

def given(): return net(), {"input": torch.eye(3)}
def too_much(): return net(), {"input": torch.eye(3), "labels": torch.eye(3)}
class Batched(Split):
    def forward(self, batch):
        return self.inner(batch["x"])
def batched(): return Batched(), {"x": torch.eye(3)}
def wide(): return nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
def tied():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    net[2].weight = net[0].weight
    return net
def split(): return Split()
def empty(): return nn.ReLU()
def poisoned():
    made = net()
    made[3].weight.data[0, 0] = float("nan")
    return made
def number(): return 3
def broken(): raise KeyError("no such setting")
def leaving(): raise SystemExit(0)
def strange(): return net(), 5
"""


@pytest.fixture
def command(command, tmp_path):
    """Run the command line in a folder with nets.py."""
    (tmp_path / "nets.py").write_text(NETS)
    return command


def audit_of(target: str, *words: str) -> list[str]:
    return ["audit", f"nets.py:{target}", "--input", "4x3", *words]


MISTAKES = {
    "no colon": (["audit", "resnet"], ["'resnet' is no target", "package.module:factory"]),
    "no such module": (["audit", "nowhere.at_all:net"], ["nowhere.at_all", "does not import"]),
    "no such file": (["audit", "nowhere.py:net"], ["there is no file nowhere.py"]),
    "no such name": (["audit", "nets.py:nett"], ["has no 'nett'", "did you mean 'net'?"]),
    "no such config": (["audit", "nowhere/config.json"], ["there is no nowhere/config.json"]),
    "factory raises": (audit_of("broken"), ["nets.py:broken raised KeyError: 'no such setting'"]),
    "factory leaves": (audit_of("leaving"), ["nets.py:leaving raised SystemExit"]),
    "no module": (audit_of("number"), ["nets.py:number gave int, not a torch module"]),
    "no inputs": (["audit", "nets.py:net"], ["gave no inputs", "--input SHAPE"]),
    "strange inputs": (["audit", "nets.py:strange"], ["inputs of type int"]),
    "shape in words": (["audit", "nets.py:net", "--input", "4xmany"], ["'4xmany' is no shape"]),
    "empty shape": (["audit", "nets.py:net", "--input", ""], ["'' is no shape"]),
    "zero in a shape": (["audit", "nets.py:net", "--input", "0x3"], ["'0x3' is no shape"]),
    "enormous shape": (["audit", "nets.py:net", "--input", "9x" + "9" * 12], ["no memory"]),
    "wrong shape": (["audit", "nets.py:net", "--input", "4x5"], ["RuntimeError in module '0'"]),
    "forward raises": (
        ["audit", "nets.py:split", "--input", "7x3"],
        ["ZeroDivisionError", "seven rows are too many"],
    ),
    "no parameters": (audit_of("empty"), ["ReLU has no parameters"]),
    "no float output": (
        ["audit", "nets.py:split", "--input", "1x3"],
        ["list", "no floating-point tensor"],
    ),
    "NaN": (audit_of("poisoned"), ["'3.weight' holds NaN"]),
    "two modes": (audit_of("net", "--train", "--eval"), ["not allowed with"]),
    "two sizes": (audit_of("net", "--shrink", "--full"), ["not allowed with"]),
    "no such checkpoint": (audit_of("net", "--weights", "a.pt"), ["there is no checkpoint 'a.pt'"]),
    "a page that is a folder": (audit_of("net", "--html", "."), ["cannot write the page '.'"]),
    "a page below a file": (
        audit_of("net", "--html", "nets.py/a.html"),
        ["cannot write the page", "is no folder"],
    ),
    "nothing to rewrite": (
        ["canonicalize", "in.safetensors", "out.safetensors", "--model", "nets.py:net"],
        ["there is no checkpoint 'in.safetensors'"],
    ),
    "another format": (
        ["canonicalize", "in.npz", "out.safetensors", "--model", "nets.py:net"],
        ["'in.npz' must end in one of .safetensors, .pt, .pth"],
    ),
    "no model": (["canonicalize", "in.safetensors", "out.safetensors"], ["--model"]),
    "unknown radius": (
        ["canonicalize", "a.safetensors", "b.safetensors", "--model", "m:n", "--radius", "big"],
        ["--radius", "'big'"],
    ),
}


@pytest.mark.parametrize(("words", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_leaves_nothing(command, tmp_path, words, says):
    code, out, error = command(*words)
    error = error.replace("printed by the user's own code\n", "")
    assert (code, out) == (2, "")
    assert error.startswith("onsphere")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    for part in says:
        assert part in error
    assert {p.name for p in tmp_path.iterdir()} <= {"nets.py", "__pycache__"}


class _Evil:
    """What runs when this is unpickled must never run."""

    def __reduce__(self):
        return (Path("ran").write_text, ("code of the checkpoint",))


def test_code_in_a_pickle_does_not_run(command, tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"0.weight": _Evil()}))
    torch.save({"0.weight": _Evil()}, tmp_path / "evil.zip.pt")
    for name in ("evil.pt", "evil.zip.pt"):
        code, out, error = command(*audit_of("net", "--weights", name))
        assert (code, out) == (2, "")
        assert f"'{name}' is no checkpoint of tensors" in error
        assert "Traceback" not in error
    assert not (tmp_path / "ran").exists()


def test_a_whole_model_in_a_pickle_is_one_line_that_says_what_to_save(command, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    code, out, error = command(*audit_of("net", "--weights", "whole.pt"))
    error = error.replace("printed by the user's own code\n", "")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "such as a whole model" in error
    assert "save model.state_dict() instead" in error
    assert "weights_only" not in error  # PyTorch's own words advise to run the code


def states(tmp_path) -> dict[str, torch.Tensor]:
    found: dict[str, object] = {}
    exec(NETS.replace("print(", "str("), found)
    return found["net"]().state_dict()


UNFIT = {
    "missing": (lambda s: s.pop("3.weight"), ["1 tensors missing ('3.weight')", "0 unexpected"]),
    "unexpected": (
        lambda s: s.update(extra=torch.ones(1)),
        ["0 tensors missing", "1 unexpected ('extra')"],
    ),
    "another shape": (
        lambda s: s.update({"3.weight": torch.ones(2, 2)}),
        ["'3.weight' has shape (2, 2), the model needs (5, 4)"],
    ),
}


@pytest.mark.parametrize(("change", "says"), UNFIT.values(), ids=UNFIT.keys())
def test_a_checkpoint_that_does_not_match(command, tmp_path, change, says):
    state = states(tmp_path)
    change(state)
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for words in (
        audit_of("net", "--weights", "a.safetensors"),
        audit_of("net", "--weights", "a.pt"),
        ["canonicalize", "a.safetensors", "b.safetensors", "--model", "nets.py:net",
         "--input", "4x3"],
    ):  # fmt: skip
        code, out, error = command(*words)
        error = error.replace("printed by the user's own code\n", "")
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert "does not match Sequential" in error
        for part in says:
            assert part in error
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (b"rubbish" * 9, "a text file"), (b"\0rubbish" * 9, "no ")],
)
def test_an_unreadable_checkpoint(command, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    code, out, error = command(*audit_of("net", "--weights", name))
    error = error.replace("printed by the user's own code\n", "")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert f"'{name}' is {says}" in error


@pytest.mark.parametrize(
    ("prefix", "made"),
    [
        ("module.", "data parallelism"),
        ("_orig_mod.", "torch.compile"),
        ("module._orig_mod.", "data parallelism and torch.compile"),
    ],
)
def test_the_prefix_of_a_wrapper_is_left_out_and_said(command, tmp_path, prefix, made):
    uneven(tmp_path)
    state = load_file(tmp_path / "a.safetensors")
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    save_file(wrapped, tmp_path / "a.safetensors")
    code, out, _ = command(*audit_of("net", "--checkpoint", "a.safetensors"))
    assert code == 0
    assert f"read without '{prefix}', the prefix of {made})" in out.replace("\n", " ")
    code, out, _ = command(*CANONICALIZE)
    assert code == 0
    assert f"'{prefix}'" in out
    assert load_file(tmp_path / "b.safetensors").keys() == wrapped.keys()
    wrapped["0.weight"] = wrapped.pop(f"{prefix}0.weight")
    save_file(wrapped, tmp_path / "a.safetensors")
    code, _, error = command(*audit_of("net", "--checkpoint", "a.safetensors"))
    assert code == 2
    assert "does not match" in error


def test_the_table_is_all_that_is_printed(command):
    code, out, error = command(*audit_of("net"))
    assert (code, error) == (0, "printed by the user's own code\n")
    assert out.startswith("Sequential in training mode: 6 weights")
    there = command(*audit_of("net", "--eval"))[1]
    assert there.startswith("Sequential in evaluation mode: 6 weights")
    assert "0.weight: per row" in out
    assert "printed" not in out


@pytest.mark.parametrize("words", [["nets.py:given"], ["nets:given"]])
def test_json_is_an_audit(command, words):
    code, out, _ = command("audit", *words, "--json")
    found = Audit.from_dict(json.loads(out, parse_constant=pytest.fail))
    assert code == 0
    assert found.mode == "train"
    assert found.parameters["0.weight"] == (4, 3)


def test_weights_of_a_checkpoint_are_used(command, tmp_path):
    state = states(tmp_path)
    state["3.weight"][0, 0] = float("nan")
    torch.save({"state_dict": state, "epoch": torch.tensor(3)}, tmp_path / "a.pt")
    code, _, error = command(*audit_of("net", "--weights", "a.pt"))
    assert code == 2
    assert "'3.weight' holds NaN" in error


def test_the_page_is_written(command, tmp_path):
    code, out, _ = command(*audit_of("net", "--train", "--html", "pages/audit.html"))
    page = (tmp_path / "pages" / "audit.html").read_text(encoding="utf-8")
    assert code == 0
    assert out.endswith("Page: pages/audit.html\n")
    assert "<h1>Audit of Sequential</h1>" in page
    assert "0.weight: per row" in page


def run_of(path: Path, x: torch.Tensor, train: bool = False) -> torch.Tensor:
    found: dict[str, object] = {}
    exec(NETS.replace("print(", "str("), found)
    net = found["net"]()
    net.load_state_dict(load_file(path))
    with torch.no_grad():
        return net.to(x.dtype).train(train)(x)


CANONICALIZE = ["canonicalize", "a.safetensors", "b.safetensors", "--model", "nets.py:net",
                "--input", "4x3"]  # fmt: skip


def uneven(tmp_path) -> dict[str, torch.Tensor]:
    state = {n: t.clone() for n, t in states(tmp_path).items()}
    state["3.weight"] *= 50
    save_file(state, tmp_path / "a.safetensors", {"format": "pt", "author": "someone"})
    return state


def test_canonicalize_keeps_the_function_the_names_and_the_metadata(command, tmp_path, generator):
    before = uneven(tmp_path)
    code, out, error = command(*CANONICALIZE, "--json")
    done = json.loads(out)
    after = load_file(tmp_path / "b.safetensors")
    x = torch.randn(8, 3, generator=generator)
    assert (code, error.count("\n")) == (0, 1)
    assert done["norm_after"] < 0.5 * done["norm_before"]
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}
    torch.testing.assert_close(after["3.weight"].norm(), after["5.weight"].norm())
    old, new = (run_of(tmp_path / f"{n}.safetensors", x) for n in "ab")
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)
    old, new = (run_of(tmp_path / f"{n}.safetensors", x, train=True) for n in "ab")
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)
    assert done["modes"] == ["train", "eval"]


def test_canonicalize_says_in_which_modes_the_output_stayed(command, tmp_path):
    uneven(tmp_path)
    assert command(*CANONICALIZE)[1].endswith("the output stayed in train and in eval mode\n")
    alone = command(*CANONICALIZE, "--force", "--modes", "audited", "--eval")[1]
    assert alone.endswith("the output stayed in eval mode\n")


def test_canonicalize_to_unit_vectors(command, tmp_path):
    uneven(tmp_path)
    code, _, err = command(*CANONICALIZE, "--train", "--radius", "unit")
    assert code == 2  # an eps notices, and the message says how to go on
    assert "with a larger --tolerance, or keep --radius initial" in err
    assert not (tmp_path / "b.safetensors").exists()
    code, out, _ = command(*CANONICALIZE, "--train", "--radius", "unit", "--tolerance", "0.01")
    assert code == 0
    assert out.startswith("b.safetensors: 9 tensors; the norm of all weights went from")
    rows = load_file(tmp_path / "b.safetensors")["0.weight"].norm(dim=1)
    torch.testing.assert_close(rows, torch.ones(4))


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("inside", [None, "state_dict", "model"])
def test_canonicalize_takes_every_kind_of_checkpoint(command, tmp_path, suffix, inside):
    state = uneven(tmp_path)
    held = {inside: state, "epoch": 3} if inside else state
    torch.save(held, tmp_path / f"a{suffix}")
    words = ["canonicalize", f"a{suffix}", f"b{suffix}", *CANONICALIZE[3:]]
    assert command(*words)[0] == 0
    after = torch.load(tmp_path / f"b{suffix}", weights_only=True)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in state.items()}
    torch.testing.assert_close(after["3.weight"].norm(), after["5.weight"].norm())


def test_a_batch_goes_in_as_forward_takes_it(command):
    """By keyword where forward takes its keys, as the one input where it takes a batch."""
    for factory in ("given", "batched"):
        code, out, _ = command("audit", f"nets.py:{factory}", "--json")
        assert code == 0
        assert "inner.weight" in out or "0.weight" in out
    code, _, error = command("audit", "nets.py:too_much")
    assert code == 2
    assert "forward of Sequential takes input, and not labels, which the batch holds" in error


def test_nothing_is_overwritten_unasked(command, tmp_path):
    uneven(tmp_path)
    (tmp_path / "b.safetensors").write_text("mine")
    code, out, error = command(*CANONICALIZE)
    assert (code, out) == (2, "")
    assert "'b.safetensors' is there already; --force overwrites it" in error
    assert (tmp_path / "b.safetensors").read_text() == "mine"
    assert command(*CANONICALIZE, "--force")[0] == 0
    assert "0.weight" in load_file(tmp_path / "b.safetensors")


def test_a_refusal_writes_nothing(command, tmp_path, monkeypatch):
    from onsphere.symmetry import CanonicalizeError

    uneven(tmp_path)

    def refuse(*_, **__):
        raise CanonicalizeError("the output would change by 3e-2")

    monkeypatch.setattr("onsphere.symmetry.canonicalize", refuse)
    code, out, error = command(*CANONICALIZE)
    assert (code, out) == (2, "")
    assert "onsphere: the output would change by 3e-2\n" in error
    assert not (tmp_path / "b.safetensors").exists()
    assert not list(tmp_path.glob(".*part"))


def test_tied_tensors_stay_tied(command, tmp_path):
    weight = torch.eye(3) * 3
    save_file({"0.weight": weight, "2.weight": weight.clone()}, tmp_path / "a.safetensors")
    words = [w.replace(":net", ":tied") for w in CANONICALIZE]
    assert command(*words)[0] == 0
    after = load_file(tmp_path / "b.safetensors")
    assert torch.equal(after["0.weight"], after["2.weight"])
    save_file({"0.weight": weight}, tmp_path / "a.safetensors")
    assert command(*words, "--force")[0] == 0
    assert list(load_file(tmp_path / "b.safetensors")) == ["0.weight"]
    save_file({"0.weight": weight, "2.weight": weight + 1}, tmp_path / "a.safetensors")
    code, _, error = command(*words, "--force")
    assert code == 2
    assert "'0.weight' and '2.weight' are one tensor in the model, but differ" in error


def test_half_precision_stays_what_it_is(command, tmp_path):
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in uneven(tmp_path).items()}
    save_file(state, tmp_path / "a.safetensors")
    assert command(*CANONICALIZE)[0] == 0
    after = load_file(tmp_path / "b.safetensors")
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in state.items()}
    assert torch.equal(after["1.num_batches_tracked"], state["1.num_batches_tracked"])
    assert not torch.equal(after["3.weight"], state["3.weight"])


def test_a_page_that_cannot_be_written(command, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onsphere.report.html.write", full)
    code, out, error = command(*audit_of("net", "--html", "a.html"))
    assert (code, out) == (2, "")
    assert "onsphere: cannot write the page 'a.html': No space left on device\n" in error


@pytest.mark.parametrize("words", [["audit"], ["canonicalize"]])
def test_help_has_examples(command, words):
    code, out, _ = command(*words, "--help")
    assert code == 0
    assert f"examples:\n  onsphere {words[0]} " in out
