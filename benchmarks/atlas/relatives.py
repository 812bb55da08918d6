"""Which models of a library come out of the same module, so that a reader finds their own name."""

import importlib
from collections.abc import Callable


def relatives(library: str, name: str) -> list[str]:
    """Return the other models that the same module of a library builds; none where it has none."""
    made = {"timm": _timm, "torchvision": _torchvision}.get(library)
    if made is None:
        return []
    names, module_of = made()
    home = module_of(name)
    return sorted(n for n in names if n != name and module_of(n) == home)


def _timm() -> tuple[list[str], Callable[[str], str]]:
    timm = importlib.import_module("timm")
    return timm.list_models(), lambda name: timm.model_entrypoint(name).__module__


def _torchvision() -> tuple[list[str], Callable[[str], str]]:
    models = importlib.import_module("torchvision.models")
    return models.list_models(), lambda name: models.get_model_builder(name).__module__
