"""Every public name is on the reference, and a change of the public surface shows in a diff."""

import importlib
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path

import onsphere

DOCS = Path(__file__).parents[2] / "docs"


def _loaded(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / "extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


packages = _loaded("packages")


def test_the_list_of_public_names_is_up_to_date():
    assert packages.LIST.read_text(encoding="utf-8") == packages.listing(), (
        "the public surface changed; if it was meant to: python docs/extensions/packages.py"
    )


def test_every_package_with_public_names_is_in_the_reference():
    found = {
        module.name
        for module in pkgutil.walk_packages(onsphere.__path__, "onsphere.")
        if module.ispkg
        and not any(part.startswith("_") for part in module.name.split("."))
        and hasattr(importlib.import_module(module.name), "__all__")
    }
    inner = {name for name in found for closed in packages.CLOSED if name.startswith(f"{closed}.")}
    assert found - inner <= set(packages.PUBLIC)
    index = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^generated/(onsphere[\w.]*)$", index, flags=re.MULTILINE)
    assert listed == list(packages.PUBLIC)


def test_what_is_exported_twice_is_one_thing():
    for package in packages.PUBLIC:
        for name in packages.names(package):
            home = packages.home(package, name)
            assert name in packages.names(home)
            assert getattr(importlib.import_module(home), name) is getattr(
                importlib.import_module(package), name
            )


def test_signatures_are_written_short():
    def example(x: "onsphere.geometry.Sphere", *, path: Path | None = None) -> list[float]: ...

    assert packages.signature(example) == (
        "(x: 'Sphere', *, path: Path | None = None) -> list[float]"
    )


def test_unions_of_older_versions_are_written_as_those_of_newer_ones():
    text = "(x: Union[Iterable[int], tuple[str, Union[int, None]]], y: int)"
    new = "(x: Iterable[int] | tuple[str, int | None], y: int)"
    assert packages._without_union(text) == new
    assert packages._without_union(new) == new


def test_a_new_argument_would_be_seen(monkeypatch):
    def changed(key: str, strict: bool = False): ...

    monkeypatch.setattr(onsphere.norms, "method", changed)
    assert packages.LIST.read_text(encoding="utf-8") != packages.listing()
