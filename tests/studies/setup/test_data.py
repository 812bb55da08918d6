"""Data files: parsed as published, and refused when they are anything else."""

import gzip
import hashlib
import http.client
import io
import os
import pickle
import tarfile
import urllib.request

import numpy as np
import pytest
import torch

from onsphere.errors import OnsphereError
from onsphere.studies.setup import data
from onsphere.studies.setup.data import Source

NAMES = [file.name for file in data._FILES["mnist"]]


def idx(array):
    """Pack an array of bytes as the format's description says."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


def published(name, content, urls=("https://example.invalid/file",)):
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return data._File(name, md5, len(content), urls)


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return [
        random.integers(0, 256, (7, 28, 28), dtype=np.uint8),
        random.permutation(np.arange(7, dtype=np.uint8)),
        random.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        np.array([2, 0, 1], dtype=np.uint8),
    ]


@pytest.fixture
def packed(arrays, monkeypatch):
    """Tiny files that the library takes for the published ones."""
    contents = dict(zip(NAMES, map(idx, arrays), strict=True))
    files = tuple(published(name, content) for name, content in contents.items())
    monkeypatch.setitem(data._FILES, "mnist", files)
    return contents


@pytest.fixture(params=["", "mnist"])
def folder(request, packed, tmp_path):
    (tmp_path / request.param).mkdir(exist_ok=True)
    for name, content in packed.items():
        (tmp_path / request.param / name).write_bytes(content)
    return tmp_path


def test_idx_files_are_read_as_they_were_written(folder, arrays):
    images = Source("mnist", folder).load()
    for found, pixels in ((images.train_x, arrays[0]), (images.test_x, arrays[2])):
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.from_numpy(pixels).float()[:, None] / 255)
    assert images.train_y.tolist() == arrays[1].tolist()
    assert images.test_y.tolist() == arrays[3].tolist()
    assert (images.classes, images.train_y.dtype) == (7, torch.int64)


def test_a_missing_file_is_named_with_size_and_checksum(packed, tmp_path):
    with pytest.raises(OnsphereError) as caught:
        Source("mnist", tmp_path / "nowhere").load()
    (name, content), *_ = packed.items()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    for part in (name, f"{len(content):,} bytes", md5, "nowhere", "--download"):
        assert part in str(caught.value)


@pytest.mark.parametrize("change", [lambda c: c[:-9], lambda c: b"", lambda c: c[:-1] + b"\x01"])
@pytest.mark.parametrize("name", NAMES)
def test_another_content_is_refused_by_name(packed, tmp_path, name, change):
    for each, content in packed.items():
        (tmp_path / each).write_bytes(change(content) if each == name else content)
    with pytest.raises(OnsphereError, match=f"{name} has .* the published file has .* md5"):
        Source("mnist", tmp_path).load()


@pytest.mark.parametrize(
    "raw",
    [
        idx(np.zeros((2, 3), dtype=np.uint8))[:-12],
        b"no gzip at all",
        gzip.compress(b"ab"),
        gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2])),
        gzip.compress(bytes([0, 0, 8, 3, 0, 0])),
        gzip.compress(b"x" * 100)[:10] + b"\xff" * 40,
    ],
    ids=["truncated", "plain", "short", "wrong count", "short header", "bad stream"],
)
def test_what_is_no_idx_file_is_refused(raw):
    with pytest.raises(OnsphereError, match=r"a\.gz is not a gzipped idx file"):
        data._parse_idx(raw, "a.gz")


# --- CIFAR-10 -------------------------------------------------------------------------------


def archive(members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def batches():
    random = np.random.default_rng(1)
    return {
        name: {
            b"batch_label": name.encode(),
            b"labels": random.permutation(10)[:4].tolist(),
            b"data": random.integers(0, 256, (4, 3072), dtype=np.uint8),
        }
        for name in (*[f"data_batch_{i}" for i in range(1, 6)], "test_batch")
    }


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    def load(members):
        content = archive({"batches.meta": b"not read", "readme.html": b"", **members})
        file = published("cifar-10-python.tar.gz", content)
        monkeypatch.setitem(data._FILES, "cifar10", (file,))
        (tmp_path / file.name).write_bytes(content)
        return Source("cifar10", tmp_path).load()

    return load


def test_cifar_is_read_as_it_was_written(cifar):
    written = batches()
    images = cifar({name: pickle.dumps(one, protocol=2) for name, one in written.items()})
    train = [written[f"data_batch_{i}"] for i in range(1, 6)]
    assert images.train_y.tolist() == [y for one in train for y in one[b"labels"]]
    pixels = np.concatenate([one[b"data"] for one in train]).reshape(20, 3, 32, 32)
    assert torch.equal(images.train_x, torch.from_numpy(pixels).float() / 255)
    assert images.test_y.tolist() == written["test_batch"][b"labels"]
    assert images.test_x.shape == (4, 3, 32, 32)


class Malicious:
    """Makes a folder when it is unpickled by a trusting reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_calls_anything_is_refused_and_not_run(cifar, tmp_path):
    trap = tmp_path / "trap"
    bad = {name: pickle.dumps(one, protocol=2) for name, one in batches().items()}
    bad["data_batch_3"] = pickle.dumps(Malicious(str(trap)), protocol=2)
    with pytest.raises(OnsphereError, match=r"Python archive \(posix.mkdir is not an array\)"):
        cifar(bad)
    assert not trap.exists()
    pickle.loads(bad["data_batch_3"])
    assert trap.exists(), "the trap would not have sprung: the test shows nothing"


@pytest.mark.parametrize("batch", [b"", b"no pickle", pickle.dumps({b"data": 1}, protocol=2)])
def test_a_damaged_batch_is_refused(cifar, batch):
    members = {name: pickle.dumps(one, protocol=2) for name, one in batches().items()}
    with pytest.raises(OnsphereError, match="not CIFAR-10's Python archive"):
        cifar({**members, "data_batch_2": batch})


def test_an_archive_that_lacks_a_batch_is_refused(cifar):
    with pytest.raises(OnsphereError, match="data_batch_1"):
        cifar({})


# --- downloads ------------------------------------------------------------------------------


@pytest.fixture
def server(packed, monkeypatch, tmp_path):
    """Serve the tiny files by file:// addresses; the first address of each is dead."""
    served = tmp_path / "served"
    served.mkdir()
    for name, content in packed.items():
        (served / name).write_bytes(content)
    dead = (tmp_path / "dead").as_uri()
    files = tuple(published(n, c, (dead, (served / n).as_uri())) for n, c in packed.items())
    monkeypatch.setitem(data._FILES, "mnist", files)
    return served


def test_missing_files_are_downloaded_once(server, packed, tmp_path):
    source = Source("mnist", tmp_path / "data", download=True)
    first = source.load()
    found = {path.name: path.read_bytes() for path in (tmp_path / "data" / "mnist").iterdir()}
    assert found == packed
    for path in server.iterdir():
        path.unlink()
    assert torch.equal(source.load().train_x, first.train_x)


def test_a_wrong_download_is_refused_and_not_kept(server, tmp_path):
    (server / NAMES[1]).write_bytes(b"<html>not found</html>")
    with pytest.raises(OnsphereError, match="published file has"):
        Source("mnist", tmp_path / "data", download=True).load()
    assert [path.name for path in (tmp_path / "data" / "mnist").iterdir()] == [NAMES[0]]


def test_an_unreachable_server_is_told(server, tmp_path):
    (server / NAMES[0]).unlink()
    with pytest.raises(OnsphereError, match=f"could not download {NAMES[0]} .*served"):
        Source("mnist", tmp_path / "data", download=True).load()
    assert not (tmp_path / "data").exists()


def test_a_server_that_speaks_no_http_is_told(server, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise http.client.BadStatusLine("SSH-2.0")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(OnsphereError, match=r"SSH-2\.0"):
        Source("mnist", tmp_path / "data", download=True).load()


def test_nothing_is_downloaded_unasked(server, monkeypatch, tmp_path):
    monkeypatch.setattr(urllib.request, "urlopen", None)
    with pytest.raises(OnsphereError, match="add --download"):
        Source("mnist", tmp_path / "data").load()


def test_a_data_folder_that_cannot_be_written_is_told(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OnsphereError, match="choose a folder with --data-dir"):
        Source("mnist", tmp_path / "file", download=True).load()


# --- the real ones --------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    assert digits.train_x.shape == (1297, 1, 8, 8)
    assert digits.test_x.shape == (500, 1, 8, 8)
    both = torch.cat([digits.train_x, digits.test_x]).flatten(1).double() * 16
    assert sorted(both.tolist()) == sorted(load_digits().data.tolist())
    assert digits.train_x.min() == 0
    assert digits.train_x.max() == 1


@pytest.mark.parametrize("name", ["mnst", "fashion", "CIFAR10"])
def test_an_unknown_data_set_is_refused_with_the_nearest(name):
    near = {"mnst": "mnist", "fashion": "fashion-mnist", "CIFAR10": "cifar10"}[name]
    with pytest.raises(OnsphereError, match=f"unknown data set {name!r}; did you mean {near!r}"):
        Source(name)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_published_files_load(name, data_dir):
    images = Source(name, data_dir).load()
    assert images.train_x.shape == (60000, 1, 28, 28)
    assert images.test_x.shape == (10000, 1, 28, 28)
    assert images.test_y.bincount().sum() == 10000
    assert images.classes == 10
    # Means that are widely quoted for these files.
    mean = {"mnist": 0.1307, "fashion-mnist": 0.2860}[name]
    assert float(images.train_x.mean()) == pytest.approx(mean, abs=5e-5)
