import pytest


@pytest.fixture
def command(command, monkeypatch):
    """Run the command line as in a terminal of 80 characters."""
    monkeypatch.setenv("COLUMNS", "80")
    return command


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch):
    """On a slow machine a command would say now and then how far it is."""
    monkeypatch.setattr("onsphere.report.progress.SECONDS_BETWEEN_LINES", float("inf"))
