"""What a report needs to be installed: tried in one process, where modules can be hidden."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, json, sys


def tried(hidden, *modules):
    "Import modules of the report anew, without what is hidden; return what went wrong."
    for name in list(sys.modules):
        if name.startswith("onsphere.report") or name.partition(".")[0] in ("matplotlib", "jinja2"):
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        for module in modules:
            importlib.import_module(f"onsphere.report{module}")
    except ModuleNotFoundError as error:
        return str(error)
    finally:
        for name in hidden:
            del sys.modules[name]
    return ""


print(json.dumps({
    "words": tried(["matplotlib", "jinja2"], "", ".document"),
    "matplotlib, figures": tried(["matplotlib"], ".figures"),
    "matplotlib, html": tried(["matplotlib"], ".html"),
    "jinja2, html": tried(["jinja2"], ".html"),
    "nothing": tried([], ".html"),
    "pyplot": "matplotlib.pyplot" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("missing", "module"), [("matplotlib", "figures"), ("matplotlib", "html"), ("jinja2", "html")]
)
def test_a_missing_extra_is_named(found, missing, module):
    said = found[f"{missing}, {module}"]
    assert said.endswith(f'needs {missing}: pip install "onsphere[study]"')


def test_words_and_terminal_need_no_extra(found):
    assert found["words"] == ""


def test_pyplot_is_not_needed(found):
    assert found["nothing"] == ""
    assert found["pyplot"] is False
