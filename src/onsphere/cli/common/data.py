"""Labelled examples for a command: a file of the user's, or a data set of the studies."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from onsphere.errors import OnsphereError

if TYPE_CHECKING:
    from torch import Tensor

_FILES = (".npz", ".safetensors", ".pt", ".pth")


class Examples(NamedTuple):
    """Inputs with labels.

    Attributes:
        name: of the data set, or of the file.
        x: inputs; bytes have become numbers in [0, 1].
        y: labels.
    """

    name: str
    x: "Tensor"
    y: "Tensor"


def labelled(data: str, folder: Path, *, download: bool = False) -> Examples:
    """Read labelled examples.

    Args:
        data: a file with the arrays ``x`` and ``y`` (.npz, .safetensors or .pt), or the name of a
            data set, whose test images these are then.
        folder: where published data files lie.
        download: fetch missing files of a data set into it.

    Raises:
        OnsphereError: no such file or data set, or it holds something else.
    """
    path = Path(data)
    if is_file(data):
        return _checked(path.name, *_arrays(path))
    from onsphere.studies.setup.data import Source

    data = data.lower()
    return Examples(data, *Source(data, folder, download).load_test())


def is_file(data: str) -> bool:
    """Return whether a file is meant, and not a data set by its name."""
    return Path(data).suffix in _FILES or Path(data).is_file()


def _arrays(path: Path) -> tuple["Tensor", "Tensor"]:
    if path.suffix not in _FILES:
        raise OnsphereError(
            f"{str(path)!r} is no file of examples: {', '.join(_FILES)} are read, with x and y"
        )
    tensors = _npz(path) if path.suffix == ".npz" else _tensors(path)
    if "x" not in tensors or "y" not in tensors:
        held = ", ".join(sorted(tensors)) or "nothing"
        raise OnsphereError(f"{str(path)!r} must hold x (inputs) and y (labels); it holds {held}")
    return tensors["x"], tensors["y"]


def _tensors(path: Path) -> dict[str, "Tensor"]:
    from onsphere.models import checkpoint

    if not path.is_file():
        raise OnsphereError(f"there is no file {str(path)!r}")
    return dict(checkpoint.read(path).tensors)


def _npz(path: Path) -> dict[str, "Tensor"]:
    import numpy as np
    import torch

    from onsphere.studies.setup.arrays import DAMAGE

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {n: torch.from_numpy(arrays[n]) for n in ("x", "y") if n in arrays.files} or {
                n: torch.empty(0) for n in arrays.files
            }
    except FileNotFoundError:
        raise OnsphereError(f"there is no file {str(path)!r}") from None
    except (*DAMAGE, TypeError) as error:  # of a type that tensors do not have
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OnsphereError(f"{str(path)!r} is no file of arrays: {first}") from error


def _checked(name: str, x: "Tensor", y: "Tensor") -> Examples:
    import torch

    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise OnsphereError(f"labels are integers, but y of {name} is {y.dtype}")
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or not len(x):
        raise OnsphereError(
            f"{name} must hold one label per input: x is {tuple(x.shape)}, y {tuple(y.shape)}"
        )
    if x.dtype == torch.uint8:
        x = x.float() / 255
    if not x.is_floating_point():
        raise OnsphereError(f"inputs are floating point or bytes, but x of {name} is {x.dtype}")
    if not bool(x.isfinite().all()):
        raise OnsphereError(f"x of {name} holds NaN or infinity")
    return Examples(name, x, y.long())
