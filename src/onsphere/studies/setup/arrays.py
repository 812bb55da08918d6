"""Images of the user's own: one ``.npz`` file with four arrays.

``x_train``, ``y_train``, ``x_test``, ``y_test``: images and the numbers of their classes. The
layout of the images is told from their shape, where it says so without doubt.
"""

import hashlib
import lzma
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onsphere.errors import OnsphereError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
"""What a file must hold; anything else in it is not read."""

_FEWEST = 64  # training images: one batch
_SMALLEST = 5  # pixels: three convolutions of stride two leave InstanceNorm two of them


def is_file(name: str) -> bool:
    """Return whether a file of arrays is meant, and not a data set by its name."""
    return name.lower().endswith(".npz")


def identity_of(path: Path) -> str:
    """Return the name of a file with the start of its SHA-256: equal names mean equal images.

    Raises:
        OnsphereError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise OnsphereError(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise OnsphereError(f"cannot read {str(path)!r} ({error.strerror})") from None
    return f"{path.name}@{digest[:12]}"


def load(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read a file of arrays.

    Args:
        path: a ``.npz`` file. Images are square, bytes or floating point in [0, 1], of shape
            (count, height, width), (count, channels, height, width) or
            (count, height, width, channels); labels are integers from 0.

    Returns:
        Training images and labels, test images and labels; images are float32 in [0, 1] with
        channels in front. Both sets are shuffled, always alike: studies look at the first images
        of a set, and files are often sorted by class.

    Raises:
        OnsphereError: the file is something else, or what it holds are no images with classes.
    """
    arrays = _read(path)
    x_train, x_test = (_images(path, arrays, f"x_{part}") for part in ("train", "test"))
    y_train, y_test = (_labels(path, arrays, part) for part in ("train", "test"))
    if x_train.shape[1:] != x_test.shape[1:]:
        raise OnsphereError(
            f"images of {path.name} differ in shape: x_train has {_shown(arrays['x_train'])}, "
            f"x_test {_shown(arrays['x_test'])}"
        )
    _check_classes(path, y_train, y_test)
    if bool((x_train == x_train.flatten()[0]).all()):
        raise OnsphereError(
            f"all pixels of x_train of {path.name} are {float(x_train.flatten()[0]):g}: there is "
            "nothing to learn from; give images that differ"
        )
    if len(x_train) < _FEWEST:
        raise OnsphereError(
            f"{path.name} has {len(x_train)} training images; a batch alone takes {_FEWEST}"
        )
    return (*_shuffled(x_train, y_train), *_shuffled(x_test, y_test))


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            if not file.peek(len(_KINDS[0])).startswith(_KINDS):
                raise OnsphereError(f"{path.name} is no readable .npz file; {_SAVE}")
            held = np.load(file, allow_pickle=False)
            if isinstance(held, np.ndarray):
                raise OnsphereError(f"{path.name} is one array; {_SAVE}")
            missing = [name for name in ARRAYS if name not in held.files]
            if missing:
                raise OnsphereError(
                    f"{path.name} lacks {', '.join(missing)}; it holds "
                    f"{', '.join(held.files) or 'nothing'}: {_SAVE}"
                )
            return {name: _array(path, name, held[name]) for name in ARRAYS}
    except FileNotFoundError:
        raise OnsphereError(f"there is no file {str(path)!r}") from None
    except DAMAGE as error:
        if "pickle" in str(error).lower():
            raise OnsphereError(
                f"{path.name} holds pickled objects, which are not read: they can run code. "
                "Save arrays of numbers"
            ) from None
        raise OnsphereError(f"{path.name} is no readable .npz file ({_first(error)})") from None


_KINDS = (b"\x93NUMPY", b"PK", b"\x80")
"""How files of one array, of several arrays and of pickled objects begin."""
DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,  # encrypted, or packed in an unknown way
    MemoryError,  # a shape that no file has
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,  # a header that ends too early
)
"""What reading a damaged file raises."""
_SAVE = "save it with np.savez(FILE, x_train=..., y_train=..., x_test=..., y_test=...)"


def _array(path: Path, name: str, held: object) -> np.ndarray:
    """Refuse what NumPy gives back as it lies in the archive, since it is no array."""
    if not isinstance(held, np.ndarray):
        raise OnsphereError(f"{name} of {path.name} is no array; {_SAVE}")
    return held


def _first(error: BaseException) -> str:
    """Return the first line of a complaint."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _images(path: Path, arrays: dict[str, np.ndarray], name: str) -> Tensor:
    x = arrays[name]
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise OnsphereError(
            f"{name} of {path.name} is {x.dtype}: images are bytes (uint8), or floating point in "
            "[0, 1]"
        )
    if x.ndim in (3, 4) and not len(x):
        raise OnsphereError(f"{name} of {path.name} holds no image")
    if x.ndim not in (3, 4) or not x.size:
        raise OnsphereError(f"{name} of {path.name} has the shape {x.shape}: {_LAYOUTS}")
    placed = x[:, None] if x.ndim == 3 else _channels_first(path, x, name)
    if placed.shape[2] != placed.shape[3] or placed.shape[2] < _SMALLEST:
        raise OnsphereError(
            f"{name} of {path.name} has images of {placed.shape[2]} x {placed.shape[3]} pixels: "
            f"crop or pad them to squares of at least {_SMALLEST} x {_SMALLEST}"
        )
    with np.errstate(over="ignore"):  # infinity is out of range, as told below
        images = torch.from_numpy(np.ascontiguousarray(placed, np.float32))
    if x.dtype == np.uint8:
        return images.div_(255)
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise OnsphereError(
            f"{name} of {path.name} ranges from {low:g} to {high:g}: images are in [0, 1]; divide "
            "by their full range, or save bytes as uint8"
        )
    return images


_LAYOUTS = (
    "images are (count, height, width), (count, channels, height, width) or "
    "(count, height, width, channels)"
)


def _channels_first(path: Path, x: np.ndarray, name: str) -> np.ndarray:
    """Find the axis of channels: images are square."""
    first, last = x.shape[2] == x.shape[3], x.shape[1] == x.shape[2]
    if first and last:
        raise OnsphereError(
            f"{name} of {path.name} has the shape {x.shape}, where channels cannot be told from "
            "pixels; enlarge the images"
        )
    if not (first or last):
        raise OnsphereError(
            f"{name} of {path.name} has the shape {x.shape}, in which no two neighbouring axes are "
            f"the sides of a square: {_LAYOUTS}; crop or pad to squares"
        )
    return x if first else x.transpose(0, 3, 1, 2)


def _labels(path: Path, arrays: dict[str, np.ndarray], part: str) -> Tensor:
    name, y, count = f"y_{part}", arrays[f"y_{part}"], len(arrays[f"x_{part}"])
    if y.dtype.kind not in "iu":
        raise OnsphereError(
            f"{name} of {path.name} is {y.dtype}: labels are integers, the numbers of the classes"
            " (of one-hot rows take argmax(1))"
        )
    if y.shape != (count,):
        raise OnsphereError(
            f"{name} of {path.name} has the shape {y.shape}: one label for each of the {count} "
            "images is wanted, in one axis (of one-hot rows take argmax(1))"
        )
    return torch.from_numpy(y.astype(np.int64))


def _check_classes(path: Path, train: Tensor, test: Tensor) -> None:
    low, high = int(min(train.min(), test.min())), int(train.max())
    if low < 0:
        raise OnsphereError(f"{path.name} has the label {low}: classes are numbered from 0")
    if high >= len(train):
        raise OnsphereError(
            f"{path.name} has the label {high} for {len(train)} training images: number the "
            "classes 0, 1, 2, ..."
        )
    if int(train.min()) == high:
        raise OnsphereError(
            f"all training images of {path.name} have the label {high}: there must be two classes "
            "or more, numbered 0, 1, 2, ..."
        )
    counts = train.bincount(minlength=high + 1)
    if int(counts.min()) == 0:
        absent = int((counts == 0).nonzero()[0])
        raise OnsphereError(
            f"no training image of {path.name} has the label {absent}: number the classes "
            "0, 1, 2, ..., without gaps"
        )
    if int(test.max()) > high:
        raise OnsphereError(
            f"{path.name} has the label {int(test.max())} in y_test, and none above {high} in "
            "y_train"
        )


def _shuffled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def _shown(x: np.ndarray) -> str:
    return " x ".join(map(str, x.shape[1:]))
