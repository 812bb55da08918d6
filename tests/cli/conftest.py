import pytest


@pytest.fixture
def command(command, monkeypatch):
    """Run the command line as in a terminal of 80 characters."""
    monkeypatch.setenv("COLUMNS", "80")
    return command
