"""Turn what a user types on a command line into a model with inputs.

A TARGET is ``package.module:factory``, ``path.py:factory``, ``timm:NAME``, ``torchvision:NAME``,
``hf:TYPE`` (an architecture of transformers with its default config), or a Hugging Face config file
or model directory, with or without ``hf:`` before it. Nothing is downloaded, and no pickled code is
ever run.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from onsphere._torch.execution import inputs_of
from onsphere.errors import nearest
from onsphere.models import checkpoint
from onsphere.models.checkpoint import line_of
from onsphere.models.libraries import LIBRARIES, from_library
from onsphere.models.target import Size, Target, TargetError, random_floats


def load(
    text: str,
    *,
    shape: tuple[int, ...] | None = None,
    train: bool = False,
    size: Size = "auto",
    weights: str | Path | None = None,
) -> Target:
    """Load a TARGET.

    Args:
        text: ``package.module:factory``, ``path.py:factory``, ``timm:NAME``, ``torchvision:NAME``,
            ``hf:TYPE``, a config file, or a directory with ``config.json``. A factory takes nothing
            and returns a module, or a module and its inputs (a tensor, a tuple, or a dict, a
            tokenizer's batch: by keyword where ``forward`` takes its keys, and as the one input
            elsewhere).
        shape: shape of a random input, in the place of what a factory gives or a config says: of
            tokens for a model of transformers that takes them, of floats for everything else.
        train: put the model in training mode.
        size: how to build a config. ``"shrink"``: two layers, with memory, so that claims can be
            certified. ``"full"``: its full size without memory. ``"real"``: its full size with
            memory. ``"auto"``: real where weights are given, or lie in the directory and are at
            most 200 million; without memory otherwise.
        weights: a checkpoint to load.

    Returns:
        The model and its inputs.

    Raises:
        TargetError: the target does not import, is not there, or gives something else.
        CheckpointError: the checkpoint is unreadable, or does not match the model.
    """
    library, _, name = text.partition(":")
    path = Path(name if library == "hf" else text)
    by_type = library == "hf" and not path.exists()
    if by_type and (path.suffix or len(path.parts) != 1):
        raise TargetError(
            f"there is no {path}: hf: takes a config file or a model directory on disk, or the "
            "name of an architecture as hf:llama, and downloads nothing"
        )
    if library in LIBRARIES:
        target = from_library(library, name, size, shape)
    elif by_type or path.is_dir() or path.suffix == ".json":
        from onsphere.models.transformers import from_config, from_name

        wanted = "real" if weights is not None and size == "auto" else size
        target = from_name(name, wanted, shape) if by_type else from_config(path, wanted, shape)
    elif ":" in text:
        if size in ("shrink", "full"):
            raise TargetError(
                f"--{size} is for a config, and {text} is a factory, which builds its model as "
                "large as it is: leave it out"
            )
        target = _from_factory(text, shape)
    else:
        raise TargetError(
            f"{text!r} is no target: give package.module:factory, path.py:factory, timm:NAME, "
            "torchvision:NAME, hf:TYPE, or a config file or model directory of transformers"
        )
    if weights is not None:
        if any(p.is_meta for p in target.model.parameters()):
            raise TargetError("a model on the meta device takes no weights: leave out --full")
        source = checkpoint.read(weights)
        note = checkpoint.note_on(source, checkpoint.load(target.model, source))
        target = _with_dtype_of_model(replace(target, note=note))
    target.model.train(train)
    return target


def _with_dtype_of_model(target: Target) -> Target:
    """Give float inputs the dtype that a checkpoint gave the model."""
    found = next((p.dtype for p in target.model.parameters() if p.is_floating_point()), None)

    def cast(value: Any) -> Any:
        wants = isinstance(value, Tensor) and value.is_floating_point() and found is not None
        return value.to(found) if wants else value

    kwargs = {k: cast(v) for k, v in target.kwargs.items()}
    return replace(target, args=tuple(cast(a) for a in target.args), kwargs=kwargs)


def _from_factory(text: str, shape: tuple[int, ...] | None) -> Target:
    place, _, name = text.rpartition(":")
    with _user_code(f"{place} does not import:"):
        module = _module(place)
    try:
        factory = getattr(module, name)
    except AttributeError as error:
        public = [n for n, v in vars(module).items() if not n.startswith("_") and callable(v)]
        raise TargetError(
            f"{place} has no {name!r}" + (nearest(name, public[:20]) if public else "")
        ) from error
    with _user_code(f"{text} raised"):
        made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"{text} gave {type(model).__name__}, not a torch module, or a module and its inputs"
        )
    if shape is not None:
        given = random_floats(shape)
    if given is None:
        raise TargetError(f"{text} gave no inputs: return (model, inputs), or say --input SHAPE")
    if isinstance(given, Mapping):
        return Target(model, *inputs_of(model, given, None))
    if not isinstance(given, Tensor | tuple | list):
        raise TargetError(
            f"{text} gave inputs of type {type(given).__name__}: give a tensor, a tuple of "
            "positional inputs, or a dict of keyword inputs"
        )
    return Target(model, (given,) if isinstance(given, Tensor) else tuple(given), {})


@contextmanager
def _user_code(what: str) -> Iterator[None]:
    """Turn whatever a user's own code raises into one line."""
    try:
        yield
    except TargetError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetError(f"{what} {type(error).__name__}: {line_of(error)}") from error


def _module(place: str) -> ModuleType:
    """Import a module by path or by name; names are looked up from the current folder too."""
    if not place.endswith(".py"):
        with _first_on_path(Path.cwd()):
            return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise TargetError(f"there is no file {place}")
    name = f"_onsphere_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{place} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    with _first_on_path(path.parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
