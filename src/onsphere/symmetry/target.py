"""Turn what a user types on a command line into a model with inputs.

A TARGET is ``package.module:factory``, ``path.py:factory``, or a Hugging Face config file or model
directory. Nothing is downloaded, and no pickled code is ever run.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from onsphere.symmetry.trace import OutputPicker

TOKENS = 16
"""Length of the token sequences made from a config."""


class TargetError(ValueError):
    """A TARGET or checkpoint that cannot be used; one line says why."""


@dataclass(frozen=True)
class Target:
    """A model with inputs.

    Args:
        model: the module.
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors to keep fixed.
        note: what was done to the model so that it could be built (shrunk, without memory).
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: OutputPicker | None = None
    note: str = ""


def load(
    text: str,
    *,
    shape: tuple[int, ...] | None = None,
    train: bool = False,
    shrink: bool = False,
) -> Target:
    """Load a TARGET.

    Args:
        text: ``package.module:factory``, ``path.py:factory``, a config file, or a directory with
            ``config.json``. A factory takes nothing and returns a module, or a module and its
            inputs (a tensor, a tuple, or a dict of keyword inputs).
        shape: shape of a random float input, where the factory gives none.
        train: put the model in training mode.
        shrink: for a config: two layers, with memory, so that claims can be certified; otherwise
            the model is built at its full size without memory.

    Returns:
        The model and its inputs.

    Raises:
        TargetError: the target does not import, is not there, or gives something else.
    """
    path = Path(text)
    if path.is_dir() or path.suffix == ".json":
        target = _from_config(path, shrink)
    elif ":" in text:
        target = _from_factory(text, shape)
    else:
        raise TargetError(
            f"{text!r} is no target: give package.module:factory, path.py:factory, or a "
            "config file or model directory of transformers"
        )
    target.model.train(train)
    return target


def parse_shape(text: str) -> tuple[int, ...]:
    """Read a shape such as ``8x3x32x32`` or ``8,3,32,32``.

    Raises:
        TargetError: it holds anything but positive whole numbers.

    Example:
        >>> parse_shape("8x3x32x32")
        (8, 3, 32, 32)
    """
    try:
        sizes = tuple(int(n) for n in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise TargetError(f"{text!r} is no shape: give positive sizes, as 8x3x32x32")
    return sizes


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint (safetensors, or a pickle of tensors only) into a model.

    Raises:
        TargetError: the file is missing, unreadable, or does not match the model.
    """
    path = Path(path)
    if not path.is_file():
        raise TargetError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TargetError(f"{path} is no readable checkpoint: {_line(error)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise TargetError(f"{path} holds no plain state dict of tensors")
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise TargetError(f"{path} does not match the model: {_line(error)}") from error
    tied = _tied_names(model)
    missing = [n for n in found.missing_keys if n not in tied]
    if missing or found.unexpected_keys:
        raise TargetError(
            f"{path} does not match the model: {len(missing)} tensors missing"
            f"{_first(missing)}, {len(found.unexpected_keys)} unexpected"
            f"{_first(found.unexpected_keys)}"
        )


def _from_factory(text: str, shape: tuple[int, ...] | None) -> Target:
    place, _, name = text.rpartition(":")
    factory = getattr(_module(place), name, None)
    if factory is None:
        raise TargetError(f"{place} has no {name!r}")
    try:
        made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except Exception as error:
        raise TargetError(f"{text} raised {type(error).__name__}: {_line(error)}") from error
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TargetError(f"{text} gave a {type(model).__name__}, not a torch module")
    if shape is not None:
        generator = torch.Generator().manual_seed(0)
        given = torch.randn(shape, generator=generator)
    if given is None:
        raise TargetError(f"{text} gave no inputs: return (model, inputs), or say --input SHAPE")
    if isinstance(given, Mapping):
        return Target(model, (), dict(given))
    return Target(model, (given,) if isinstance(given, Tensor) else tuple(given), {})


def _module(place: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise TargetError(f"there is no file {place}")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None:
                raise TargetError(f"{place} cannot be imported")
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(path.stem, module)
            spec.loader.exec_module(module)
            return module
        return importlib.import_module(place)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(
            f"{place} does not import: {type(error).__name__}: {_line(error)}"
        ) from error


def _from_config(path: Path, shrink: bool) -> Target:
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            "a model config needs the package transformers to be installed"
        ) from error
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise TargetError(f"there is no {file}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        kind = data.pop("model_type")
        config = transformers.AutoConfig.for_model(kind, **data)
    except (OSError, json.JSONDecodeError, KeyError, ValueError, TypeError) as error:
        raise TargetError(f"{file} is no model config: {_line(error)}") from error
    note = ""
    if shrink:
        note = _shrink(config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    auto: Any = transformers.AutoModel
    architecture = getattr(transformers, (data.get("architectures") or [""])[0], None)
    build: Callable[[], nn.Module] = (
        (lambda: architecture(config))
        if architecture is not None
        else (lambda: auto.from_config(config))
    )
    try:
        if shrink:
            model = build()
        else:
            with torch.device("meta"):
                model = build()
            note = "built without memory: claims are exact but not certified on numbers"
    except Exception as error:
        raise TargetError(f"{file}: the model cannot be built: {_line(error)}") from error
    return Target(model, (), _inputs_of(model, config), _logits, note)


def _shrink(config: Any) -> str:
    changed = []
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers",
                "encoder_layers", "decoder_layers"):  # fmt: skip
        if isinstance(getattr(config, key, None), int) and getattr(config, key) > 2:
            setattr(config, key, 2)
            changed.append(key)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:2]
    return f"shrunk to two layers ({', '.join(changed)})" if changed else "built at its full size"


def _inputs_of(model: nn.Module, config: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", "input_ids")
    vocabulary = int(getattr(config, "vocab_size", None) or 100)
    tokens = torch.randint(0, vocabulary, (2, TOKENS), generator=generator)
    if name == "input_ids":
        kwargs: dict[str, Any] = {"input_ids": tokens}
    elif name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        kwargs = {name: torch.randn(2, channels, height, width, generator=generator)}
    elif name == "input_values":
        kwargs = {name: torch.randn(2, 8000, generator=generator)}
    else:
        raise TargetError(
            f"no inputs are known for {type(model).__name__}, which takes {name!r}: give a factory "
            "that returns (model, inputs)"
        )
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = tokens[:, : TOKENS // 2]
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return kwargs


def _logits(result: Any) -> Any:
    if isinstance(result, Mapping):
        for key in ("logits", "last_hidden_state"):
            if key in result:
                return result[key]
    return result


def _tied_names(model: nn.Module) -> set[str]:
    once = {n for n, _ in model.named_parameters()}
    return {n for n, _ in model.named_parameters(remove_duplicate=False)} - once


def _line(error: BaseException) -> str:
    lines = (str(error) or repr(error)).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2])


def _first(names: list[str]) -> str:
    return f" ({names[0]!r})" if names else ""
