"""Tiny Shakespeare: 1,115,394 characters, checked by checksum."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from onsphere.errors import OnsphereError
from onsphere.studies.engine.job import Config, Inputs, Outcome

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
"""Of ``input.txt``, as it is published with char-rnn and nanoGPT."""


def encode(folder: Path, _config: Config, _inputs: Inputs) -> Outcome:
    """Read the text in ``folder`` as a sequence of small integers."""
    text = read(folder)
    alphabet = sorted(set(text))
    numbers = torch.tensor([alphabet.index(c) for c in text], dtype=torch.uint8)
    return Outcome({"characters": len(text), "alphabet": len(alphabet)}, {"text": numbers})


def read(folder: Path) -> str:
    """Return the text.

    Raises:
        OnsphereError: the file is missing, or not the published one.
    """
    path = folder / "tinyshakespeare" / "input.txt"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise OnsphereError(
            f"tiny Shakespeare is read from {str(path)!r} ({error.strerror}); put the published "
            "input.txt (karpathy/char-rnn) there, or name another folder with --data-dir"
        ) from None
    found = hashlib.sha256(raw).hexdigest()
    if found != SHA256:
        raise OnsphereError(f"{str(path)!r} has SHA-256 {found}; the published file has {SHA256}")
    return raw.decode()


def split(text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut into training (90 %), validation (5 %) and test (5 %) text, in the order it is read."""
    one, two = len(text) * 90 // 100, len(text) * 95 // 100
    return text[:one], text[one:two], text[two:]


def windows(text: Tensor, length: int, most: int) -> Tensor:
    """Return at most ``most`` windows of ``length + 1`` characters that overlap by one.

    They are evenly spread over the text.
    """
    count = (len(text) - 1) // length
    chosen = torch.linspace(0, count - 1, min(most, count)).round().long()
    return text[chosen[:, None] * length + torch.arange(length + 1)].long()
