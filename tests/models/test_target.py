"""What a user types, turned into a model with inputs."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from onsphere.errors import OnsphereError
from onsphere.models.checkpoint import CheckpointError, load, read
from onsphere.models.load import load as load_target
from onsphere.models.target import TargetError, parse_shape
from onsphere.symmetry import CanonicalizeError, ModelError
from onsphere.symmetry.exact.trace import trace

FACTORY = """
from dataclasses import dataclass
from torch import nn
import torch
from neighbour import SIZE

@dataclass
class Setting:
    size: int = SIZE

class Net(nn.Linear):
    def __init__(self):
        super().__init__(Setting().size, 2)

made = nn.Linear(3, 2)

def positional(): return Net(), (torch.ones(1, SIZE),)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("SIZE = 3\n")
    (tmp_path / "factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("neighbour", "factory"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("place", ["factory.py", "factory"])
@pytest.mark.parametrize("name", ["Net", "made", "positional"])
def test_a_factory_a_class_and_a_module(folder, place, name):
    before = list(sys.path)
    target = load_target(f"{place}:{name}", shape=None if name == "positional" else (4, 3))
    assert isinstance(target.model, nn.Linear)
    assert target.args[0].shape == ((1, 3) if name == "positional" else (4, 3))
    assert not target.model.training
    assert sys.path == before


def test_a_factory_has_one_size(folder):
    with pytest.raises(TargetError, match="--shrink is for a config, and factory:Net is a factory"):
        load_target("factory:Net", shape=(4, 3), size="shrink")


def test_a_file_called_like_a_package_hides_nothing(folder):
    (folder / "json.py").write_text("import torch\nnet = torch.nn.Linear(2, 2)\n")
    assert isinstance(load_target("json.py:net", shape=(1, 2)).model, nn.Linear)
    assert json.loads("[1]") == [1]


def test_the_mode_and_the_same_input_every_time(folder):
    one, two = (load_target("factory:Net", shape=(4, 3), train=True) for _ in range(2))
    assert one.model.training
    assert torch.equal(one.args[0], two.args[0])


@pytest.mark.parametrize(
    ("text", "shape"), [("3", (3,)), ("8x3x32x32", (8, 3, 32, 32)), ("8,3", (8, 3))]
)
def test_shapes(text, shape):
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "x", "3x", "-1x3", "3.5", "²", "0", "3x0", "1e3", " 3"])
def test_what_is_no_shape(text):
    with pytest.raises(TargetError, match="no shape"):
        parse_shape(text)


def test_every_error_is_one_line_for_the_command_line():
    for error in (TargetError, ModelError, CheckpointError, CanonicalizeError):
        assert issubclass(error, OnsphereError)
        assert issubclass(error, ValueError)


def test_a_checkpoint_gives_the_model_its_dtype(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in net.state_dict().items()}
    del state["1.num_batches_tracked"]
    save_file(state, tmp_path / "a.safetensors")
    load(net, read(tmp_path / "a.safetensors"))
    assert net[0].weight.dtype == torch.bfloat16


def test_a_model_is_left_as_it_was_when_the_checkpoint_does_not_match(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    changed = {n: t + 1 for n, t in before.items()} | {"1.bias": torch.ones(5)}
    save_file(changed, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"'1.bias' has shape \(5,\)"):
        load(net, read(tmp_path / "a.safetensors"))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 999, "pad_token_id": 998,
}  # fmt: skip


class TestConfigs:
    """Models of transformers, built from what lies on disk."""

    @pytest.fixture(autouse=True)
    def _transformers(self):
        pytest.importorskip("transformers")

    @pytest.fixture
    def config(self, tmp_path):
        path = tmp_path / "llama" / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(LLAMA))
        return path

    def test_the_full_size_takes_no_memory(self, config):
        target = load_target(str(config))
        assert all(p.is_meta for p in target.model.parameters())
        assert len(target.model.model.layers) == 5
        assert "meta device" in target.note

    def test_shrunk_it_has_two_layers_and_memory(self, config):
        target = load_target(str(config), size="shrink", shape=(1, 9))
        assert len(target.model.model.layers) == 2
        assert target.model.lm_head.weight.shape == (256, 16)
        assert target.kwargs["input_ids"].shape == (1, 9)
        assert int(target.kwargs["input_ids"].max()) < 256
        with torch.no_grad():
            assert target.output(target.model(**target.kwargs)).shape == (1, 9, 256)

    def test_a_directory_is_audited_with_its_weights(self, config):
        real = load_target(str(config), size="real").model
        real.save_pretrained(config.parent, safe_serialization=True)
        target = load_target(str(config.parent))
        assert torch.equal(target.model.lm_head.weight, real.lm_head.weight)
        assert target.note == ""
        assert all(
            p.is_meta for p in load_target(str(config.parent), size="full").model.parameters()
        )

    def test_names_without_the_prefix_of_the_base_model_match(self, config, tmp_path):
        real = load_target(str(config), size="real").model
        state = {n.removeprefix("model."): t.contiguous() for n, t in real.state_dict().items()}
        save_file(state, tmp_path / "a.safetensors")
        target = load_target(str(config), weights=tmp_path / "a.safetensors")
        assert torch.equal(target.model.lm_head.weight, real.lm_head.weight)

    def test_weights_need_memory(self, config, tmp_path):
        with pytest.raises(TargetError, match="leave out --full"):
            load_target(str(config), size="full", weights=tmp_path / "a.safetensors")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"model_type": "nothing_known"}, "no model config"),
            ({"model_type": None}, "no model config"),
            ({"architectures": ["os"]}, "knows no architecture 'os'"),
            ({"architectures": ["AutoConfig"]}, "cannot be built"),
            ({"hidden_size": "many"}, "config"),
            ({"num_attention_heads": 0}, "llama"),
            ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, None),
        ],
    )
    def test_a_bad_config_is_one_line(self, config, change, says):
        (config.parent / "evil.py").write_text("raise RuntimeError('it ran')")
        config.write_text(json.dumps({k: v for k, v in {**LLAMA, **change}.items() if v}))
        if says is None:
            load_target(str(config))  # what a directory brings along is not run
            return
        with pytest.raises(TargetError, match=says) as caught:
            load_target(str(config))
        assert "\n" not in str(caught.value)

    def test_an_architecture_by_name_has_its_default_config(self):
        target = load_target("hf:gpt2")
        assert type(target.model).__name__ == "GPT2LMHeadModel"
        assert len(target.model.transformer.h) == 12
        assert all(p.is_meta for p in target.model.parameters())
        assert type(load_target("hf:bert").model).__name__ == "BertForMaskedLM"

    def test_no_weight_has_memory_where_a_model_gives_one_values(self):
        target = load_target("hf:wav2vec2")
        assert all(p.is_meta for p in target.model.parameters())

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("hf:lama", "no architecture 'lama'; there are .*llama"),
            ("hf:qqqqqq", "no architecture 'qqqqqq'$"),
            ("hf:clip_text/config.json", "there is no clip_text/config.json: hf: takes"),
            ("hf:pix2struct", "none of the models known by name"),
        ],
    )
    def test_a_name_that_cannot_be_used_is_one_line(self, text, says):
        with pytest.raises(TargetError, match=says) as caught:
            load_target(text)
        assert "\n" not in str(caught.value)

    def test_two_towers_are_shrunk_and_get_texts_and_images(self):
        target = load_target("hf:clip", size="shrink")
        assert type(target.model).__name__ == "CLIPModel"
        assert len(target.model.vision_model.encoder.layers) == 2
        assert target.model.config.text_config.hidden_size == 128
        assert set(target.kwargs) == {"input_ids", "pixel_values"}
        with torch.no_grad():
            assert target.output(target.model(**target.kwargs)).shape == (2, 2)

    def test_experts_are_audited_without_memory(self, config):
        data = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        config.write_text(json.dumps({**data, "num_local_experts": 3, "num_hidden_layers": 1}))
        full, real = (load_target(str(config), size=size) for size in ("full", "real"))
        assert all(p.is_meta for p in full.model.parameters())
        of_full, of_real = (
            trace(t.model, t.args, t.kwargs, output=t.output).basis for t in (full, real)
        )
        assert len(of_full) == len(of_real) == 6
        assert all({"model.embed_tokens.weight"} != set(v) for v in of_full)

    def test_a_model_of_sound_gets_short_spectra(self):
        target = load_target("hf:whisper", size="shrink")
        assert target.kwargs["input_features"].shape == (2, 80, 128)
        with torch.no_grad():
            assert target.output(target.model(**target.kwargs)).shape[:2] == (2, 8)

    def test_a_config_that_is_no_json(self, config):
        config.write_text("{")
        with pytest.raises(TargetError, match="no model config"):
            load_target(str(config))

    def test_a_directory_without_a_config(self, tmp_path):
        with pytest.raises(TargetError, match="there is no"):
            load_target(str(tmp_path))


def test_a_shrunk_model_is_narrower_and_keeps_how_heads_are_shared(tmp_path):
    pytest.importorskip("transformers")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512,
        "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = load_target(str(tmp_path / "config.json"), size="shrink")
    first = target.model.model.layers[0].self_attn
    assert len(target.model.model.layers) == 2
    assert target.note.startswith("two layers of it, 1/4 as wide")
    assert target.model.config.hidden_size == 128
    assert first.q_proj.weight.shape == (128, 128)
    assert first.k_proj.weight.shape == (64, 128)
