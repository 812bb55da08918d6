"""The data sets of the studies: images in [0, 1] with labels.

``digits`` comes with scikit-learn and needs no files. The others are read from the files in which
they were published, checked by checksum; they are downloaded only when the user asks. A user's own
images are a file of arrays (:mod:`~onsphere.studies.setup.arrays`).
"""

import gzip
import hashlib
import http.client
import io
import pickle
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from onsphere._utils.files import write_whole
from onsphere.errors import OnsphereError, nearest
from onsphere.studies.setup import arrays


@dataclass(frozen=True)
class Images:
    """A classification data set, in memory.

    Attributes:
        name: the data set; a file of arrays has the start of its checksum behind it.
        train_x: training images, float32 in [0, 1].
        train_y: their labels.
        test_x: test images.
        test_y: their labels.
    """

    name: str
    train_x: Float[Tensor, "train channels height width"]
    train_y: Int[Tensor, "train"]
    test_x: Float[Tensor, "test channels height width"]
    test_y: Int[Tensor, "test"]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_y.max()) + 1


@dataclass(frozen=True)
class Source:
    """Which data set, and where its files are.

    Args:
        name: a key of :data:`DATASETS`, or the path of a ``.npz`` file.
        folder: where published files lie, directly or in a folder of the data set's name.
        download: fetch missing files into ``folder``.

    Raises:
        OnsphereError: no such data set.
    """

    name: str
    folder: Path = Path("data")
    download: bool = False

    def __post_init__(self) -> None:
        if self.name not in DATASETS and not arrays.is_file(self.name):
            raise OnsphereError(
                f"unknown data set {self.name!r}{nearest(self.name, list(DATASETS))}; your own "
                "images go into a file ending in .npz"
            )

    @property
    def identity(self) -> str:
        """Name of the images in records: that of the data set, or of a file and its content.

        Raises:
            OnsphereError: a file cannot be read.
        """
        return arrays.identity_of(Path(self.name)) if arrays.is_file(self.name) else self.name

    def load(self) -> Images:
        """Read the data set.

        Raises:
            OnsphereError: a file is missing, truncated or not the published one, or a file of
                arrays holds something else.
        """
        if arrays.is_file(self.name):
            return Images(self.identity, *arrays.load(Path(self.name)))
        return DATASETS[self.name](self)

    def load_test(self) -> tuple[Tensor, Tensor]:
        """Read the test images and labels alone; of files with both, the whole.

        Raises:
            OnsphereError: a file is missing, truncated or not the published one.
        """
        if DATASETS.get(self.name) is _idx:
            return _labelled(self, _FILES[self.name][2:])
        images = self.load()
        return images.test_x, images.test_y


@dataclass(frozen=True)
class _File:
    """A published file: its name, MD5 and size as published, and where it can be had."""

    name: str
    md5: str
    size: int
    urls: tuple[str, ...]


def _mnist_files(base: tuple[str, ...], *sums: tuple[str, int]) -> tuple[_File, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(
        _File(f"{name}-ubyte.gz", md5, size, tuple(f"{b}/{name}-ubyte.gz" for b in base))
        for name, (md5, size) in zip(names, sums, strict=True)
    )


_FILES = {
    "mnist": _mnist_files(
        ("https://ossci-datasets.s3.amazonaws.com/mnist",),
        ("f68b3c2dcbeaaa9fbdd348bbdeb94873", 9912422),
        ("d53e105ee54ea40749a09fcbcd1e9432", 28881),
        ("9fb629c4189551a2d022fa330f9573f3", 1648877),
        ("ec29112dd5afa0611ce80d1b7f02629c", 4542),
    ),
    "fashion-mnist": _mnist_files(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",),
        ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26421880),
        ("25c81989df183df01b3e8a0aad5dffbe", 29515),
        ("bef4ecab320f06d8554ea6380940ec79", 4422102),
        ("bb300cfdad3c16e7a12a480ee83cd310", 5148),
    ),
    "cifar10": (
        _File(
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            170498071,
            ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
        ),
    ),
}


def _digits(source: Source) -> Images:
    """Scikit-learn's 1,797 digits of 8x8 pixels; 500 of them, drawn once, are the test set."""
    table = torch.from_numpy(_table_of_digits())
    x = (table[:, :-1] / 16.0).float().reshape(-1, 1, 8, 8)
    y = table[:, -1].long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Images(source.name, x[500:], y[500:], x[:500], y[:500])


def _table_of_digits() -> NDArray[np.float64]:
    """Return a row for each digit: its pixels from 0 to 16, and its label."""
    library = find_spec("sklearn")
    if library is None or library.origin is None:
        raise OnsphereError('the digits come with scikit-learn: pip install "onsphere[study]"')
    # Read from the library's folder: importing it takes every worker seconds.
    packed = Path(library.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if packed.exists():
        return np.loadtxt(packed, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.float64)


def _idx(source: Source) -> Images:
    """MNIST's format: four gzipped idx files."""
    files = _FILES[source.name]
    return Images(source.name, *_labelled(source, files[:2]), *_labelled(source, files[2:]))


def _labelled(source: Source, files: Sequence[_File]) -> tuple[Tensor, Tensor]:
    """Read a file of images and the one of their labels."""
    x, y = (_parse_idx(_read(source, file), file.name) for file in files)
    return x.float().div(255).unsqueeze(1), y.long()


def _parse_idx(packed: bytes, name: str) -> Tensor:
    try:
        raw = gzip.decompress(packed)
        rank = raw[3]
        shape = np.frombuffer(raw, dtype=">i4", count=rank, offset=4)
        body = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank)
        return torch.from_numpy(body.reshape(shape).copy())
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise OnsphereError(f"{name} is not a gzipped idx file ({error})") from None


def _cifar10(source: Source) -> Images:
    """CIFAR-10's Python archive, read without trusting its pickles."""
    (file,) = _FILES[source.name]
    packed = _read(source, file)
    try:
        batches = _unpack_batches(packed)
        train = _stack([batches[f"data_batch_{i}"] for i in range(1, 6)])
        test = _stack([batches["test_batch"]])
    except _UNREADABLE as error:
        raise OnsphereError(f"{file.name} is not CIFAR-10's Python archive ({error})") from None
    return Images(source.name, *train, *test)


def _unpack_batches(packed: bytes) -> dict[str, dict[bytes, Any]]:
    batches: dict[str, dict[bytes, Any]] = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive.getmembers():
            stream = archive.extractfile(member)
            if stream is not None and "_batch" in member.name:
                batches[Path(member.name).name] = _ArrayUnpickler(stream, encoding="bytes").load()
    return batches


def _stack(batches: list[dict[bytes, Any]]) -> tuple[Tensor, Tensor]:
    pixels = np.concatenate([batch[b"data"] for batch in batches])
    labels = [label for batch in batches for label in batch[b"labels"]]
    return torch.from_numpy(pixels).reshape(-1, 3, 32, 32).float().div(255), torch.tensor(labels)


_UNREADABLE = (
    tarfile.TarError,
    zlib.error,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
)
"""What reading an archive raises when it is another one."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain values, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype"}
        if module.split(".")[0] == "numpy" and name in allowed:
            if name == "_reconstruct":
                return np.ndarray.__reduce__(np.empty(0))[0]
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def _read(source: Source, file: _File) -> bytes:
    """Return a published file's bytes, checked; download it first if that was asked for."""
    places = [source.folder / source.name / file.name, source.folder / file.name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        if not source.download:
            raise OnsphereError(
                f"{source.name} needs {file.name} ({file.size:,} bytes, md5 {file.md5}) in "
                f"{str(source.folder)!r} or {str(source.folder / source.name)!r}; put it there, "
                "name another folder with --data-dir, or add --download"
            )
        path = places[0]
        _download(file, path)
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise OnsphereError(f"cannot read {str(path)!r} ({error.strerror})") from None
    _check(file, packed, str(path))
    return packed


def _check(file: _File, packed: bytes, where: str) -> None:
    found = hashlib.md5(packed, usedforsecurity=False).hexdigest()
    if found != file.md5:
        raise OnsphereError(
            f"{where} has {len(packed):,} bytes and md5 {found}; the published file has "
            f"{file.size:,} bytes and md5 {file.md5}: fetch it again"
        )


def _download(file: _File, path: Path) -> None:
    problem = "no address is known for it"
    for url in file.urls:
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                packed = response.read(2 * file.size + 1)
        except (OSError, http.client.HTTPException) as error:
            problem = f"{url}: {error}"
            continue
        _check(file, packed, url)
        try:
            write_whole(path, packed)
        except OSError as error:
            raise OnsphereError(
                f"cannot write {str(path)!r} ({error.strerror}); choose a folder with --data-dir"
            ) from None
        return
    raise OnsphereError(f"could not download {file.name} ({problem})")


DATASETS: dict[str, Callable[[Source], Images]] = {
    "digits": _digits,
    "mnist": _idx,
    "fashion-mnist": _idx,
    "cifar10": _cifar10,
}
"""Every data set's reader by name; ``digits`` is the default."""
