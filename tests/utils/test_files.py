from pathlib import Path

import pytest

from onsphere._utils.files import write_whole


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    write_whole(path, b"one")
    assert write_whole(path, b"two").read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_that_cannot_be_gives_oserror_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        write_whole(tmp_path / "file" / "a.txt", b"content")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failure_midway_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a.txt", b"old")

    def full(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
