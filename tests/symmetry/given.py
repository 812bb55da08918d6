"""What a model is given beside its features (lengths, masks, labels), and pieces that use it."""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from symmetry.networks import WIDTH
from symmetry.pieces import Piece

ROWS = 9
"""Rows of the tables that token ids look up."""
CLASSES = 4
LONGEST = 12
"""No sequence is longer."""


@dataclass(frozen=True)
class Given:
    """Inputs beside the features; which there are depends on the model."""

    ids: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None
    edges: Tensor | None = None
    owner: Tensor | None = None
    target: Tensor | None = None


class GivenPiece(Piece):
    """A piece that also takes what was given; ``needs`` says what, by way."""

    needs: ClassVar[dict[str, str]] = {}

    def __init__(self, r: random.Random, has: frozenset[str] = frozenset()) -> None:
        super().__init__(r)
        self.way = r.choice([w for w in self.ways if not self.needs.get(w) or self.needs[w] in has])

    @classmethod
    def fits(cls, has: frozenset[str]) -> bool:
        """Whether any of its ways needs no more than there is."""
        return any(not cls.needs.get(w) or cls.needs[w] in has for w in cls.ways)

    def forward(self, x: Tensor, given: Given) -> Tensor:
        raise NotImplementedError


class Chain(nn.Module):
    """Pieces one after the other, maybe with a residual around each."""

    def __init__(self, pieces: list[nn.Module], residual: list[bool]) -> None:
        super().__init__()
        self.pieces, self.residual = nn.ModuleList(pieces), residual

    def forward(self, x: Tensor, given: Given) -> Tensor:
        for piece, residual in zip(self.pieces, self.residual, strict=True):
            y = piece(x, given) if isinstance(piece, GivenPiece) else piece(x)
            x = x + y if residual else y
        return x


def real_tokens(way: str, given: Given, n: int) -> Tensor:
    """Write down which tokens are no padding, (batch, time), in one of the ways people do."""
    if way == "ids":
        assert given.ids is not None
        return given.ids != 0
    if way == "given":
        assert given.mask is not None
        return given.mask
    lengths = given.lengths
    assert lengths is not None
    if way == "rows":
        mask = torch.zeros(len(lengths), n)
        for i, length in enumerate(lengths.tolist()):
            mask[i, :length] = 1
        return mask
    if way == "ones":
        mask = torch.ones(len(lengths), n, dtype=torch.bool)
        for i in range(len(lengths)):
            mask[i, int(lengths[i].item()) :] = False
        return mask
    return torch.arange(n)[None, :] < lengths[:, None]


MASKS = ("rows", "ones", "arange", "ids", "given")
MASK_NEEDS = {**dict.fromkeys(MASKS[:3], "lengths"), "ids": "ids", "given": "mask"}


class Masking(GivenPiece):
    """Padding set to 0, in as many ways as there are."""

    ways, needs = MASKS, MASK_NEEDS

    def __init__(self, r: random.Random, has: frozenset[str] = frozenset()) -> None:
        super().__init__(r, has)
        self.how = r.choice(["times", "fill", "fill in place", "index", "where"])

    def forward(self, x: Tensor, given: Given) -> Tensor:
        mask, y = real_tokens(self.way, given, x.shape[1]), self.a(x)
        gone = mask[..., None] == 0
        match self.how:
            case "times":
                return y * mask.unsqueeze(-1).to(y.dtype)
            case "fill":
                return y.masked_fill(gone, 0.0)
            case "fill in place":
                return y.masked_fill_(gone, 0)
            case "index":
                y = y.clone()
                y[mask == 0] = 0.0
                return y
        return torch.where(gone, torch.zeros_like(y), y)


class ByLengths(GivenPiece):
    """Each sentence by itself, in a loop over lengths read by python."""

    ways = ("centre", "reverse", "mean", "longest", "packed", "share", "split", "number")
    needs = dict.fromkeys(ways, "lengths")

    def forward(self, x: Tensor, given: Given) -> Tensor:
        lengths, y = given.lengths, self.a(x)
        assert lengths is not None
        if self.way == "longest":
            longest = int(lengths.max().item())
            return torch.cat([y[:, :longest].cumsum(1), y[:, longest:]], 1)
        if self.way == "packed":
            pack, pad = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
            packed = pack(y, lengths, batch_first=True, enforce_sorted=False)
            packed = packed._replace(data=torch.relu(packed.data))
            return pad(packed, batch_first=True, total_length=x.shape[1])[0]
        if self.way == "split":
            parts = torch.cat([y[i, :n] for i, n in enumerate(lengths)]).split(lengths.tolist())
            return nn.utils.rnn.pad_sequence([*parts, y[0]], batch_first=True)[:-1]
        if self.way == "number":
            return x + y * lengths.float().mean().item()
        out = torch.zeros_like(y)
        for i, n in enumerate(lengths.tolist()):
            if self.way == "centre":
                out[i, :n] = y[i, :n] - y[i, :n].mean(0)
            elif self.way == "reverse":
                out[i, :n] = y[i, :n].flip(0)
            elif self.way == "share":
                out[i] = y[i] / n
            else:
                out[i, :n] = x[i, :n] + y[i, :n].sum(0, keepdim=True) / n
        return out


class LabelOneHot(GivenPiece):
    """A class, or the tokens, as one-hot vectors that a matrix takes in."""

    ways = ("scatter", "put", "one_hot", "eye", "compare", "count", "ids scatter", "ids one_hot",
            "filled", "film")  # fmt: skip
    needs: ClassVar = {
        w: "ids" if w in ("count", "ids scatter", "ids one_hot") else "labels" for w in ways
    }

    def __init__(self, r: random.Random, has: frozenset[str] = frozenset()) -> None:
        super().__init__(r, has)
        size = ROWS if self.needs[self.way] == "ids" else CLASSES
        self.c = nn.Linear(size, WIDTH, bias=False)

    def forward(self, x: Tensor, given: Given) -> Tensor:
        if self.needs[self.way] == "ids":
            assert given.ids is not None
            return self.a(x) + self.c(self._tokens(given.ids, x))
        assert given.labels is not None
        told = self.c(self._hot(given.labels, x)).unsqueeze(1)
        return self.a(x) * (1 + told) if self.way == "film" else self.a(x) + told

    def _tokens(self, ids: Tensor, x: Tensor) -> Tensor:
        if self.way == "count":
            counts = torch.zeros(len(ids), ROWS, dtype=x.dtype)
            ones = torch.ones_like(ids, dtype=x.dtype)
            return counts.scatter_add_(1, ids, ones).unsqueeze(1)
        if self.way == "ids one_hot":
            return nn.functional.one_hot(ids, ROWS).to(x.dtype)
        hot = x.new_zeros(*ids.shape, ROWS)
        return hot.scatter_(-1, ids.unsqueeze(-1), 1.0)

    def _hot(self, labels: Tensor, x: Tensor) -> Tensor:
        b = len(labels)
        match self.way:
            case "put" | "film":
                hot = torch.zeros(b, CLASSES, dtype=x.dtype)
                hot[torch.arange(b), labels] = 1
                return hot
            case "one_hot":
                return nn.functional.one_hot(labels, CLASSES).to(x.dtype)
            case "eye":
                return torch.eye(CLASSES, dtype=x.dtype)[labels]
            case "compare":
                return (labels[:, None] == torch.arange(CLASSES)[None]).to(x.dtype)
            case "filled":
                hot = torch.full((b, CLASSES), 0.1 / (CLASSES - 1)).to(x.dtype)
                return hot.scatter_(1, labels[:, None], 0.9)
        return torch.zeros(b, CLASSES, dtype=x.dtype).scatter_(1, labels.view(-1, 1), 1.0)
