"""The API reference: one page per public package, written from its ``__all__`` before each build.

Names of a package stand under the module that they are written in, after that module's own words,
so pages follow when code moves. Nothing here lists a name.
"""

import argparse
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import packages
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

FOLDER = Path(__file__).parents[1] / "reference" / "generated"


def write(_: Sphinx | None = None) -> None:
    """Write all pages; one that would not change is left alone, so it is not read again."""
    os.environ["COLUMNS"] = "88"  # the width of the command line's help
    pages = {package: "\n".join(page(package)) for package in packages.PUBLIC}
    pages["command-line"] = "\n".join(command_line())
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        path = FOLDER / f"{name}.rst"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def page(package: str) -> Iterator[str]:
    """Return the lines of a package's page."""
    module = importlib.import_module(package)
    yield from _heading(f"``{package}``", "=")
    yield f".. module:: {package}"
    yield ""
    yield from inspect.cleandoc(module.__doc__ or "").splitlines()
    yield ""
    by_source: dict[ModuleType, list[str]] = {}
    elsewhere = []
    for name in packages.names(package):
        thing = getattr(module, name)
        if isinstance(thing, ModuleType | str) or packages.home(package, name) != package:
            elsewhere.append(name)
        else:
            by_source.setdefault(packages.source(package, name), []).append(name)
    if by_source:
        yield from _table(package, [name for names in by_source.values() for name in names])
    if elsewhere:
        yield from _elsewhere(package, elsewhere)
    for source, names in by_source.items():
        if source is not module:
            first, _, rest = inspect.cleandoc(source.__doc__ or package).partition("\n")
            yield from _heading(_title(first), "-")
            yield from rest.splitlines()
            yield ""
        for name in names:
            yield from _entry(package, name, source)


def _heading(title: str, line: str) -> Iterator[str]:
    yield title
    yield line * (len(title) + 2)
    yield ""


def _title(sentence: str) -> str:
    """Return a sentence as a heading."""
    return sentence.removesuffix(".")


def _words(thing: Any, source: ModuleType, name: str) -> str:
    """Return the docstring of anything; of data the string that stands below it."""
    if hasattr(thing, "__qualname__"):
        return inspect.getdoc(thing) or ""
    code = inspect.getsource(source)
    found = re.search(rf'^{name}\b.*?^"""(.*?)"""$', code, flags=re.MULTILINE | re.DOTALL)
    return inspect.cleandoc(found[1]) if found else ""


def _table(package: str, names: list[str]) -> Iterator[str]:
    module = importlib.import_module(package)
    yield from (".. list-table::", "   :widths: auto", "   :class: names", "")
    for name in sorted(names, key=lambda name: (name.lower(), name)):
        words = _words(getattr(module, name), packages.source(package, name), name)
        yield f"   * - :py:obj:`{name} <{package}.{name}>`"
        yield f"     - {_first_sentence(words)}"
    yield ""


def _first_sentence(words: str) -> str:
    paragraph = " ".join(words.partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s(?=[A-Z`:])", paragraph)[0]


def _elsewhere(package: str, names: list[str]) -> Iterator[str]:
    module = importlib.import_module(package)
    yield from ("Also from here:", "")
    for name in names:
        thing, home = getattr(module, name), packages.home(package, name)
        if isinstance(thing, ModuleType):
            yield f"- :py:mod:`{name} <{thing.__name__}>`: {_first_sentence(thing.__doc__ or '')}"
        elif home == package:
            yield f"- ``{name}``, now ``{thing}``"
        else:
            yield f"- :py:obj:`{name} <{home}.{name}>`, of :py:mod:`{home}`"
    yield ""


def _entry(package: str, name: str, source: ModuleType) -> Iterator[str]:
    thing = getattr(importlib.import_module(package), name)
    yield f".. py:currentmodule:: {package}"
    yield ""
    if isinstance(thing, type):
        yield from (f".. autoclass:: {package}.{name}", "   :members:", "   :show-inheritance:")
    elif hasattr(thing, "__qualname__"):
        yield f".. autofunction:: {package}.{name}"
    else:
        yield f".. py:data:: {name}"
        yield ""
        yield from (f"   {line}" for line in _words(thing, source, name).splitlines())
    yield ""


def command_line() -> Iterator[str]:
    """Return the lines of the page that has what ``onsphere COMMAND --help`` prints."""
    cli = importlib.import_module("onsphere.cli")
    parser = cli.parser()
    yield from _heading("Command line", "=")
    yield "One command is one library call. What the help says:"
    yield ""
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in (("onsphere", parser), *commands.choices.items()):
        yield from _heading(f"``{'' if command is parser else 'onsphere '}{name}``", "-")
        yield from (".. code-block:: text", "")
        yield from (f"   {line}" for line in command.format_help().splitlines())
        yield ""


def resolve(
    _: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Link other names of what is public, and show what is not public as code, without a link.

    Either has to exist: what does not is a broken link, and stops the build.
    """
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "")
    if target.startswith(("'", '"')):  # a literal, or the shape of a tensor
        return content
    package, _, name = target.rpartition(".")
    if package in packages.PUBLIC and name in packages.names(package):
        home = packages.home(package, name)
        domain, document = env.domains.python_domain, node.get("refdoc", "")
        builder = env._app.builder
        return domain.resolve_xref(env, document, builder, "obj", f"{home}.{name}", node, content)
    if _exists(target) or any(_written_near(target, node)):
        return content
    return None


def _exists(target: str) -> bool:
    parts = target.split(".")
    if parts[0] != "onsphere":
        return False
    for count in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return all((thing := getattr(thing, part, None)) is not None for part in parts[count:])
    return False


def _written_near(target: str, node: pending_xref) -> Iterator[bool]:
    """Look where the docstring is written, for members and for names that are not public."""
    package, owner = node.get("py:module") or "", node.get("py:class") or ""
    module = importlib.import_module(package) if package.startswith("onsphere") else None
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if not isinstance(thing, ModuleType):
            yield _exists(f"{packages.source(package, name).__name__}.{target}")
        if name == owner and isinstance(thing, type):
            yield target in getattr(thing, "__annotations__", {}) or hasattr(thing, target)
    if node.get("reftype") == "exc":
        ours = [found for path, found in sys.modules.items() if path.startswith("onsphere")]
        yield any(hasattr(found, target) for found in ours)


def plain_properties(_: Sphinx, what: str, *rest: Any) -> None:
    """Keep Napoleon from taking what stands before a property's first colon for its type."""
    if what == "property":
        rest[-1].insert(0, "\\ ")


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages before each build."""
    app.connect("builder-inited", write)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", plain_properties, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
