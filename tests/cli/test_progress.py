"""What is shown while a command works."""

import pytest
from rich.console import Console

from onsphere.cli.common import progress as _progress
from onsphere.report import progress


@pytest.mark.parametrize("shown", [_progress.stages, _progress.bar])
def test_names_of_files_are_not_markup(shown, monkeypatch, capsys):
    terminal = lambda **_: Console(stderr=True, force_terminal=True, width=100)  # noqa: E731
    monkeypatch.setattr(progress, "Console", terminal)
    with shown(False) as show:
        show("reading [/red]a[bold].npz")
    assert "[/red]a[bold].npz" in capsys.readouterr().err
