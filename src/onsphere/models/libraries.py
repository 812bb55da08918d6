"""Models of timm and torchvision by name, with random weights; nothing is downloaded."""

import importlib
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from onsphere.models.checkpoint import line_of
from onsphere.models.target import CERTIFIABLE, Size, Target, TargetError, random_floats

_IMAGE = (3, 224, 224)
_BATCH = 2


def from_library(library: str, name: str, size: Size, shape: tuple[int, ...] | None) -> Target:
    """Build a model of a library by its name.

    Args:
        library: a key of :data:`LIBRARIES`.
        name: as the library lists it.
        size: ``"full"``: without memory; ``"auto"``: with random weights up to 200 million;
            ``"real"``: with random weights.
        shape: of a random input; without, two images of the size that the library names.

    Raises:
        TargetError: the library or the model is not there, or cannot be built.
    """
    if size == "shrink":
        raise TargetError("--shrink is for config files of transformers: leave it out here")
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise TargetError(
            f"{library}:{name} needs {library}: pip install {library} ({line_of(error)})"
        ) from error
    names, build, image_shape = LIBRARIES[library]
    known = names(module)
    if name not in known:
        raise TargetError(f"{library} has no model {name!r}{_alike(name, known)}")
    try:
        model = _without_memory(build, module, name)
        small = sum(p.numel() for p in model.parameters()) <= CERTIFIABLE
        note = "built at its full size on the meta device"
        if size == "real" or (size == "auto" and small):
            note = "random weights"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = build(module, name)
        given = shape or (_BATCH, *image_shape(name, model))
    except TargetError:
        raise
    except Exception as error:  # a library can fail in any way
        raise TargetError(f"{library}:{name} cannot be built: {line_of(error)}") from error
    return Target(model, (random_floats(given),), {}, note=note)


def _without_memory(build: Callable[..., nn.Module], module: Any, name: str) -> nn.Module:
    """Build a model on the meta device; one that reads numbers while it is built, with memory."""
    try:
        with torch.device("meta"):
            return build(module, name)
    except NotImplementedError:
        with torch.random.fork_rng(devices=[]):
            return build(module, name).to("meta")


def _alike(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=6)
    return f"; there are {', '.join(close)}" if close else f" among its {len(known)}"


def _timm_names(timm: Any) -> list[str]:
    return list(timm.list_models())


def _timm_model(timm: Any, name: str) -> nn.Module:
    made: nn.Module = timm.create_model(name, pretrained=False)
    return made


def _timm_images(_: str, model: nn.Module) -> tuple[int, ...]:
    known = getattr(model, "pretrained_cfg", None) or {}
    return tuple(known.get("input_size") or _IMAGE)


def _torchvision_names(torchvision: Any) -> list[str]:
    return list(torchvision.models.list_models())


def _torchvision_model(torchvision: Any, name: str) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    if "detection" in builder.__module__:
        raise TargetError(
            f"torchvision:{name} is a detector, which takes images and boxes: give a factory that "
            "returns (model, inputs)"
        )
    backbone = "weights_backbone" in inspect.signature(builder).parameters
    options = {"weights_backbone": None} if backbone else {}
    made: nn.Module = builder(weights=None, **options)
    return made


def _torchvision_images(name: str, model: nn.Module) -> tuple[int, ...]:
    """Return the size that the published weights were made for."""
    models = importlib.import_module("torchvision.models")
    weights = models.get_model_weights(name)
    found = next(iter(weights), None)
    size = 224 if found is None else getattr(found.transforms(), "crop_size", [224])
    sides = [size] if isinstance(size, int) else list(size)
    height, width = sides[0], sides[-1]
    if ".video." in type(model).__module__:
        return (3, 16, height, width)
    return (3, height, width)


LIBRARIES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "timm": (_timm_names, _timm_model, _timm_images),
    "torchvision": (_torchvision_names, _torchvision_model, _torchvision_images),
}
"""Library -> its names of models, how to build one, and the size of its images."""
