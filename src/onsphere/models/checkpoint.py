"""Checkpoints: files of tensors, matched with a model by name, written whole or not at all.

Safetensors files hold nothing but tensors. A pickle can hold code; it is read with torch's
restricted unpickler (``weights_only=True``), which refuses everything but tensors.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from onsphere._utils.files import write_whole
from onsphere.errors import OnsphereError

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin")
"""How the names of checkpoints end; all but the first are pickles of tensors."""

_INSIDE = ("state_dict", "model_state_dict", "model")
"""Where training scripts put the state dict of the model, beside the optimizer's and the step."""


_WRAPPERS = {"module.": "data parallelism", "_orig_mod.": "torch.compile"}


class CheckpointError(OnsphereError, ValueError):
    """A checkpoint cannot be read, or does not match the model; one line says why."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, by the names that the file gives them.

    Args:
        path: where it was read.
        tensors: name -> tensor.
        metadata: the text that a safetensors file carries beside its tensors.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of all its floating-point tensors; ``None`` where they differ."""
        found = {t.dtype for t in self.tensors.values() if t.is_floating_point()}
        return found.pop() if len(found) == 1 else None


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint: safetensors, or a pickle of a state dict.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {str(path)!r}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{str(path)!r} is empty")
    if _is_text(path):
        raise CheckpointError(
            f"{str(path)!r} is a text file and no checkpoint: give safetensors, or a .pt or .pth "
            "of torch.save(model.state_dict(), ...)"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Checkpoint(path, tensors, file.metadata() or {})
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{str(path)!r} is no safetensors file: {line_of(error)}") from error
    except UnpicklingError as error:
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of tensors: it is broken, or holds objects that only "
            "code can make, such as a whole model, and no pickled code is run; save "
            "model.state_dict() instead"
        ) from error
    except Exception as error:  # the unpickler raises whatever a broken file makes it raise
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of tensors: {line_of(error)}"
        ) from error
    if isinstance(state, Mapping):
        state = next((state[k] for k in _INSIDE if isinstance(state.get(k), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{str(path)!r} holds no plain state dict of tensors")
    unnamed = next((name for name in state if not isinstance(name, str)), None)
    if unnamed is not None:
        raise CheckpointError(f"{str(path)!r} must hold tensors by name: {unnamed!r} is no name")
    return Checkpoint(path, dict(state))


def matched(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Return which tensor of a model each tensor of a checkpoint is.

    Names agree as they are, or up to the prefix under which a model of transformers holds its
    base, or that ``torch.compile`` and data-parallel wrappers left on all names of the file
    (:func:`wrapped_by`). What a model says it ignores (masks that older files carry) is left out.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or tied in the model
            and different in the file.
    """
    own = model.state_dict(keep_vars=True)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    ignored = [
        re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    names, unexpected = {}, []
    wrapper = wrapped_by(checkpoint)
    for name in checkpoint.tensors:
        inner = name.removeprefix(wrapper)
        spellings = (name, inner, prefix + inner, inner.removeprefix(prefix))
        found = next((s for s in spellings if s in own), None)
        if found is not None:
            names[name] = found
        elif not any(p.search(name) for p in ignored):
            unexpected.append(name)
    given = {id(own[n]) for n in names.values()}
    missing = [n for n, t in own.items() if id(t) not in given and not _made_by_forward(n)]
    if missing or unexpected:
        raise CheckpointError(
            f"{str(checkpoint.path)!r} does not match {type(model).__name__}: "
            f"{len(missing)} tensors missing{_first(missing)}, "
            f"{len(unexpected)} unexpected{_first(unexpected)}"
        )
    _check_values(model, checkpoint, names, own)
    return names


def _is_text(path: Path) -> bool:
    """Whether a file begins with printable text, as no checkpoint does."""
    with path.open("rb") as file:
        return all(32 <= byte < 127 or byte in b"\t\n\r" for byte in file.read(256))


def wrapped_by(checkpoint: Checkpoint) -> str:
    """Return the prefix that wrappers left on all names of a file: of a compiled model, of DDP.

    Example:
        >>> wrapped_by(Checkpoint(Path("net.pt"), {"_orig_mod.module.weight": torch.ones(1)}))
        '_orig_mod.module.'
    """
    found = ""
    while checkpoint.tensors:
        more = (p for p in _WRAPPERS if all(n.startswith(found + p) for n in checkpoint.tensors))
        if (prefix := next(more, None)) is None:
            break
        found += prefix
    return found


def note_on(checkpoint: Checkpoint, names: Mapping[str, str]) -> str:
    """Say that names were read without a prefix; nothing where they were read as they are.

    Args:
        checkpoint: what was read.
        names: name in the file -> name in the model.
    """
    prefix = wrapped_by(checkpoint)
    if not prefix or all(theirs == ours for theirs, ours in names.items()):
        return ""
    made = " and ".join(_WRAPPERS[p] for p in _WRAPPERS if p in prefix)
    return f"names of the checkpoint read without {prefix!r}, the prefix of {made}"


def load(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Put the tensors of a checkpoint into a model, which takes its dtype where it has one.

    Returns:
        Name in the file -> name in the model.

    Raises:
        CheckpointError: as for :func:`matched`; the model is then as it was.
    """
    names = matched(model, checkpoint)
    if checkpoint.dtype is not None:
        model.to(checkpoint.dtype)
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, ours in names.items():
            own[ours].copy_(checkpoint.tensors[name])
    return names


def write(
    checkpoint: Checkpoint, model: nn.Module, names: Mapping[str, str], path: str | Path
) -> Path:
    """Write a model's tensors as a checkpoint was: its names, dtypes and metadata.

    What the model did not change is written bit by bit as it was read.

    Raises:
        CheckpointError: the file cannot be written. Nothing half written is left.
    """
    own = model.state_dict()
    tensors = {}
    for name, before in checkpoint.tensors.items():
        tensors[name] = before.contiguous()
        if name in names:
            after = own[names[name]].to(before.dtype)
            tensors[name] = after.contiguous().clone()  # tied tensors get memory of their own
    try:
        return write_whole(Path(path), _packed(tensors, checkpoint.metadata, Path(path).suffix))
    except OSError as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def _packed(tensors: dict[str, Tensor], metadata: Mapping[str, str], suffix: str) -> bytes:
    if suffix == ".safetensors":
        return save(tensors, dict(metadata) or None)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def line_of(error: BaseException) -> str:
    """Return the first lines of an error as one."""
    lines = (str(error) or repr(error)).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2])


def _check_values(
    model: nn.Module,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    own: Mapping[str, Tensor],
) -> None:
    seen: dict[int, str] = {}
    for name, ours in names.items():
        given, expected = checkpoint.tensors[name], own[ours]
        if given.shape != expected.shape:
            raise CheckpointError(
                f"{str(checkpoint.path)!r} does not match {type(model).__name__}: {name!r} has "
                f"shape {tuple(given.shape)}, the model needs {tuple(expected.shape)}"
            )
        first = seen.setdefault(id(expected), name)
        if first != name and not torch.equal(given, checkpoint.tensors[first]):
            raise CheckpointError(
                f"{str(checkpoint.path)!r} does not match {type(model).__name__}: {first!r} and "
                f"{name!r} are one tensor in the model, but differ in the file"
            )


def _made_by_forward(name: str) -> bool:
    """Older files lack BatchNorm's counter, which no output depends on."""
    return name.endswith("num_batches_tracked")


def _first(names: list[str]) -> str:
    return f" ({names[0]!r})" if names else ""
