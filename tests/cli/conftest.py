import pytest

from onsphere import cli


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run the command line in an empty folder; return exit code, output and error output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run
