"""The public surface: which packages have it, and what each exports, with signatures.

This needs no Sphinx. Run as a program, it writes ``docs/public-names.txt``.
"""

import enum
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

LIST = Path(__file__).parents[1] / "public-names.txt"

# In the order of the reference. What a package exports is its `__all__`.
PUBLIC = (
    "onsphere",
    "onsphere.symmetry",
    "onsphere.symmetry.exact",
    "onsphere.optim",
    "onsphere.planning",
    "onsphere.monitor",
    "onsphere.integrations.huggingface",
    "onsphere.integrations.lightning",
    "onsphere.robustness",
    "onsphere.norms",
    "onsphere.geometry",
    "onsphere.dynamics",
    "onsphere.report",
    "onsphere.errors",
)
# Packages whose inner packages are for the library itself, even those with an `__all__`.
CLOSED = ("onsphere.optim",)


def names(package: str) -> list[str]:
    """Return what a package exports, sorted."""
    return sorted(import_module(package).__all__, key=lambda name: (name.lower(), name))


def home(package: str, name: str) -> str:
    """Return the public package that documents what ``package`` exports as ``name``.

    Where several export the same object it is the first below the top, and else the top itself.
    """
    thing = getattr(import_module(package), name)
    if isinstance(thing, ModuleType | str):
        return package
    for other in (*PUBLIC[1:], PUBLIC[0]):
        module = import_module(other)
        if name in module.__all__ and getattr(module, name) is thing:
            return other
    return package


def source(package: str, name: str) -> ModuleType:
    """Return the module in which something public is written."""
    thing = getattr(import_module(package), name)
    if hasattr(thing, "__qualname__"):
        return sys.modules[thing.__module__]
    for module in list(sys.modules.values()):
        path = getattr(module, "__name__", "")
        if path.startswith(f"{package}.") and vars(module).get(name) is thing:
            code = inspect.getsource(module)
            if re.search(rf"^{name}\b.*? = ", code, flags=re.MULTILINE):
                return module
    return import_module(package)


def signature(thing: Any) -> str:
    """Write a signature with short names of types; nothing where there is none."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    return re.sub(r"<factory>|<[^<>]* at 0x\w+>", "...", _short(str(found)))


def _short(text: str) -> str:
    return _without_union(re.sub(r"\b(?:[a-zA-Z_]\w*\.)+(?=[A-Za-z_])", "", text))


def _without_union(text: str) -> str:
    """Write ``Union[A, B]``, as older versions of PyTorch have it, as ``A | B``."""
    start = text.find("Union[")
    if start < 0:
        return text
    depth, parts = 0, [""]
    for end, letter in enumerate(text[start + 6 :], start + 6):
        depth += (letter in "[(") - (letter in "])")
        if depth < 0:
            joined = " | ".join(part.strip() for part in parts)
            return _without_union(text[:start] + joined + text[end + 1 :])
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return text


def listing() -> str:
    """Return the public surface as text: one line per name, and per member of a class."""
    lines = [
        "The public names of onsphere and their signatures. After a change of either:",
        "    python docs/extensions/packages.py",
    ]
    for package in PUBLIC:
        lines += ["", package]
        for name in names(package):
            lines += [f"    {line}" for line in _entry(package, name)]
    return "\n".join(lines) + "\n"


def _entry(package: str, name: str) -> Iterator[str]:
    thing, documented = getattr(import_module(package), name), home(package, name)
    if documented != package:
        yield f"{name}: see {documented}"
    elif isinstance(thing, ModuleType):
        yield f"{name}: package"
    elif isinstance(thing, type):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        yield f"class {name}({bases})"
        if issubclass(thing, enum.Enum):
            yield f"    = {', '.join(repr(member.value) for member in thing)}"
        elif not issubclass(thing, BaseException):
            yield f"    {signature(thing)}"
        yield from (f"    {line}" for line in _members(thing))
    elif callable(thing):
        yield f"{name}{signature(thing)}"
    else:
        yield f"{name}: {type(thing).__name__}"


def _members(owner: type) -> Iterator[str]:
    found: dict[str, Any] = {}
    for base in owner.__mro__:
        if base.__module__.startswith("onsphere."):
            found = dict(vars(base)) | found
    for name in sorted(found):
        member = found[name]
        if name.startswith("_"):
            continue
        if isinstance(member, classmethod | staticmethod):
            yield f".{name}{signature(getattr(owner, name))}"
        elif inspect.isfunction(member):
            yield f".{name}{signature(member)}"
        elif isinstance(member, property) or hasattr(member, "__get__"):
            yield f".{name}"


if __name__ == "__main__":
    LIST.write_text(listing(), encoding="utf-8")
