"""Models of the transformers library: by a config file, a model directory, or by name.

The model is built from its config; its inputs are made up from it. Only safetensors weights are
read, and nothing is downloaded: code that a directory brings along is not run.
"""

import copy
import importlib
import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onsphere.models.checkpoint import line_of
from onsphere.models.target import CERTIFIABLE, Size, Target, TargetError, random_floats

TOKENS = 16
"""Length of the token sequences made from a config."""
VOCABULARY = 256
"""Largest vocabulary of a shrunk model; special tokens beyond it become its last one."""

FRAMES = 64
"""Longest sound of a shrunk model that takes spectra, in positions of its encoder."""

_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers",
)  # fmt: skip

_WIDTHS = (
    "hidden_size", "intermediate_size", "n_embd", "n_inner", "d_model", "d_ff", "ffn_dim",
    "encoder_ffn_dim", "decoder_ffn_dim", "word_embed_proj_dim", "moe_intermediate_size",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "encoder_attention_heads",
    "decoder_attention_heads",
)  # fmt: skip
_TASKS = (
    "ForZeroShotImageClassification", "ForSpeechSeq2Seq", "ForSeq2SeqLM", "ForMaskedLM",
    "ForCausalLM", "ForImageClassification", "ForCTC", "",
)  # fmt: skip
"""For which of its tasks an architecture is built that is given by name: the first it has."""
_SHARES = (16, 8, 4, 2)
_NARROWEST = 128
"""Least width of a shrunk model."""


def from_config(path: Path, size: Size, shape: tuple[int, ...] | None) -> Target:
    """Build a model from its config file, or from a directory that holds one.

    Args:
        path: the file or directory.
        size: see :func:`onsphere.models.load.load`.
        shape: shape of its main input.

    Returns:
        The model and its inputs.

    Raises:
        TargetError: the config or transformers is missing, or it cannot build the model.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise TargetError(f"there is no {file}")
    transformers = _transformers()
    config, data = _config(transformers, file)
    architecture = _architecture(transformers, path, data)
    stored = path.is_dir() and bool(list(path.glob("*.safetensors")))
    return _built(str(path), architecture, config, size, shape, path if stored else None)


def from_name(name: str, size: Size, shape: tuple[int, ...] | None) -> Target:
    """Build an architecture of transformers from the default values of its config.

    Args:
        name: its ``model_type``, as a config file has it: ``llama``, ``gpt2``, ``bert``.
        size: see :func:`onsphere.models.load.load`.
        shape: shape of its main input.

    Returns:
        The model, for the first of its tasks in a fixed order, and its inputs.

    Raises:
        TargetError: transformers is missing, does not know the name, or cannot build the model.
    """
    transformers = _transformers()
    _check_type(f"there is no {name}, and", name)
    try:
        config = transformers.AutoConfig.for_model(name)
    except Exception as error:  # a config can ask for what it has no default for
        raise TargetError(f"hf:{name} has no default config: {line_of(error)}") from error
    mappings = [getattr(transformers, f"AutoModel{task}")._model_mapping for task in _TASKS]
    found = next((m[type(config)] for m in mappings if type(config) in m), None)
    if found is None:
        raise TargetError(
            f"hf:{name} is none of the models known by name: give a config file that names its "
            "architecture, or a factory that returns (model, inputs)"
        )
    architecture = found[0] if isinstance(found, list | tuple) else found
    return _built(f"hf:{name}", architecture, config, size, shape, None)


def _built(
    what: str,
    architecture: Any,
    config: Any,
    size: Size,
    shape: tuple[int, ...] | None,
    stored: Path | None,
) -> Target:
    """Build a model of its size, with the weights that are stored beside its config if any."""
    for key in ("_attn_implementation", "_experts_implementation"):
        setattr(config, key, "eager")
    note = ""
    if size == "shrink":
        _shrink(config)
        config, share = _narrowed(architecture, config)
        width = f", 1/{share} as wide" if share > 1 else ""
        note = f"two layers of it{width}, with at most 256 tokens, and random weights"
    try:
        with torch.device("meta"):
            model = architecture._from_config(config)
        small = sum(p.numel() for p in model.parameters()) <= CERTIFIABLE
        if size == "auto" and stored and small:
            model = _with_weights(architecture, stored, config)
        elif size in ("shrink", "real"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = architecture._from_config(config)
        else:
            model = model.to("meta")  # some make a parameter with values all the same
            note = "built at its full size on the meta device"
            config._experts_implementation = "batched_mm"  # which tokens an expert gets is unknown
    except TargetError:
        raise
    except Exception as error:  # a config can break a model in any way
        raise TargetError(f"{what}: the model cannot be built: {line_of(error)}") from error
    return Target(model, (), _inputs(model, config, shape), _logits, note)


def _transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise TargetError("a model config needs transformers: pip install transformers") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _check_type(before: str, name: str) -> None:
    """Raise where transformers knows no model of a type."""
    known = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    if name not in known:
        raise TargetError(
            f"{before} transformers has no architecture {name!r}{_alike(name, known)}"
        )


def _alike(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=6)
    return f"; there are {', '.join(close)}" if close else ""


def _config(transformers: Any, file: Path) -> tuple[Any, dict[str, Any]]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        kind = str(data["model_type"])
        _check_type(f"{file} is no model config:", kind)
        rest = {k: v for k, v in data.items() if k != "model_type"}
        return transformers.AutoConfig.for_model(kind, **rest), data
    except TargetError:
        raise
    except KeyError as error:
        raise TargetError(f"{file} is no model config: it names no model_type") from error
    except Exception as error:  # transformers checks values in its own ways
        raise TargetError(f"{file} is no model config: {line_of(error)}") from error


def _architecture(transformers: Any, path: Path, data: Mapping[str, Any]) -> Any:
    named = (data.get("architectures") or [None])[0]
    if named is None:
        kind = transformers.AutoConfig.for_model(data["model_type"])
        return transformers.AutoModel._model_mapping[type(kind)]
    found = getattr(transformers, str(named), None)
    if found is None:
        raise TargetError(f"{path}: transformers knows no architecture {named!r}")
    return found


def _with_weights(architecture: Any, path: Path, config: Any) -> nn.Module:
    model, info = architecture.from_pretrained(
        path, config=config, local_files_only=True, use_safetensors=True,
        dtype=torch.float32, output_loading_info=True,
    )  # fmt: skip
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise TargetError(
            f"the weights in {path} do not match its config: {len(wrong)} tensors missing or of "
            f"another shape ({str(sorted(map(str, wrong))[0])!r})"
        )
    return model


def _shrink(config: Any) -> None:
    """Leave two layers, and few tokens, also of the towers that a config joins."""
    for tower in _towers(config):
        _shrink(tower)
    if isinstance(getattr(config, "max_source_positions", None), int):
        config.max_source_positions = min(config.max_source_positions, FRAMES)
    for key in _DEPTHS:
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, min(2, getattr(config, key)))
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:2]
    if isinstance(getattr(config, "vocab_size", None), int):
        config.vocab_size = min(config.vocab_size, VOCABULARY)
        for key, token in list(vars(config).items()):
            if key.endswith("token_id") and type(token) is int:
                setattr(config, key, min(token, config.vocab_size - 1))


def _towers(config: Any) -> list[Any]:
    """Return the configs of the models that this one joins."""
    keys = getattr(config, "sub_configs", None) or ()
    return [getattr(config, k) for k in keys if getattr(config, k, None) is not None]


def _narrowed(architecture: Any, config: Any) -> tuple[Any, int]:
    """Return the config of a narrower model of the same structure, and by how much it is narrower.

    Widths and heads are divided by the same power of two, so that the size of a head and how many
    heads share one of keys stay. Which weights scale together does not depend on any of them.
    """
    for share in _SHARES:
        narrow = copy.deepcopy(config)
        if not _divide(narrow, share):
            continue
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                model = architecture._from_config(narrow)
                model(**_inputs(model, narrow, None))
        except Exception:
            continue
        return narrow, share
    return config, 1


def _divide(config: Any, share: int) -> bool:
    """Divide widths and heads; return whether they allow it."""
    found = {
        key: value
        for key in (*_WIDTHS, *_HEADS)
        if type(value := getattr(config, key, None)) is int
    }
    towers = _towers(config)
    heads = [found[k] for k in _HEADS if k in found]
    widths = [found[k] for k in _WIDTHS if k in found]
    if towers and not heads:
        return all(_divide(tower, share) for tower in towers)
    if not heads or not widths or min(widths) // share < _NARROWEST or max(heads) // share < 2:
        return False
    for key, value in found.items():
        if value % share and not (key in _HEADS and value < share):
            return False
        setattr(config, key, max(1, value // share))
    return True


def _inputs(model: nn.Module, config: Any, shape: tuple[int, ...] | None) -> dict[str, Any]:
    name = getattr(model, "main_input_name", "input_ids")
    if _is_contrastive(model, config):
        kwargs = {"input_ids": _tokens(config, (2, TOKENS)), "pixel_values": _images(config, shape)}
    elif name == "input_ids":
        kwargs = {name: _tokens(config, shape or (2, TOKENS))}
    elif name == "pixel_values":
        kwargs = {name: _images(config, shape)}
    elif name == "input_values":
        kwargs = {name: random_floats(shape or (2, 8000))}
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        bins = getattr(config, "num_mel_bins", 80)
        kwargs = {name: random_floats(shape or (2, bins, 2 * config.max_source_positions))}
    else:
        raise TargetError(
            f"no inputs are known for {type(model).__name__}, which takes {name!r}: give a factory "
            "that returns (model, inputs)"
        )
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = _tokens(config, (2, TOKENS // 2))
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return kwargs


def _is_contrastive(model: nn.Module, config: Any) -> bool:
    """Tell whether a model compares texts with images, each from a tower of its own."""
    towers = hasattr(config, "text_config") and hasattr(config, "vision_config")
    return towers and hasattr(model, "logit_scale")


def _images(config: Any, shape: tuple[int, ...] | None) -> torch.Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return random_floats(shape or (2, getattr(vision, "num_channels", 3), height, width))


def _tokens(config: Any, shape: tuple[int, ...]) -> torch.Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", None) or 100)
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def _logits(result: Any) -> Any:
    if isinstance(result, Mapping):
        for key in ("logits", "logits_per_image", "last_hidden_state"):
            if key in result:
                return result[key]
    return result
