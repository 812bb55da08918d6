"""Which slices of weights can be rescaled, by the rank of radial derivatives: no rule is asked.

Every slice along every axis of every weight is one column; every random combination of outputs, at
random weights and inputs, is one row of inner products of slices with their gradients. What all
rows are orthogonal to is a symmetry to first order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from onsphere.symmetry.claims import Family

Column = tuple[str, int, int]
"""Weight, axis, place."""


@dataclass(frozen=True)
class Columns:
    """All slices of a network along all axes with two entries or more."""

    names: tuple[Column, ...]

    @classmethod
    def of(cls, net: nn.Module, sliding: Sequence[str] = ()) -> "Columns":
        """Take the first two axes only of weights that slide over positions."""
        found = []
        for name, p in net.named_parameters():
            axes = [a for a, n in enumerate(p.shape) if n > 1 and (a < 2 or name not in sliding)]
            found += [(name, a, i) for a in axes for i in range(p.shape[a])]
        return cls(tuple(found))

    def derivatives(self, net: nn.Module) -> Tensor:
        """Inner products of slices and gradients."""
        own = dict(net.named_parameters())
        products = {
            n: torch.zeros_like(p) if p.grad is None else p.detach() * p.grad
            for n, p in own.items()
        }
        return torch.stack([products[n].select(a, i).sum() for n, a, i in self.names])

    def trivial(self) -> Tensor:
        """All rows of a weight against all its columns: rescalings that do nothing at all."""
        rows = []
        for name in dict.fromkeys(n for n, _, _ in self.names):
            axes = sorted({a for n, a, _ in self.names if n == name})
            rows += [
                [float((n, a) == (name, b)) - float((n, a) == (name, c)) for n, a, _ in self.names]
                for b, c in pairwise(axes)
            ]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(self.names))

    def claimed(self, families: Sequence[Family]) -> Tensor:
        """One row for each channel of each family."""
        place = {c: k for k, c in enumerate(self.names)}
        rows = []
        for family in families:
            for channel in range(family.count):
                row = torch.zeros(len(self.names), dtype=torch.float64)
                for s in family.slices:
                    for i in s.index[channel].tolist():
                        if (k := place.get((s.name, s.axes[0], i))) is not None:
                            row[k] += float(s.exponent)
                rows.append(row)
        return torch.stack(rows) if rows else torch.zeros(0, len(self.names), dtype=torch.float64)


@dataclass(frozen=True)
class Entries:
    """All entries of all weights of a network, one by one: fit for tiny networks only."""

    names: tuple[Column, ...]

    @classmethod
    def of(cls, net: nn.Module) -> "Entries":
        """Take every entry; there is no axis to tell."""
        found = [(n, -1, i) for n, p in net.named_parameters() for i in range(p.numel())]
        return cls(tuple(found))

    def derivatives(self, net: nn.Module) -> Tensor:
        """Products of entries and gradients."""
        return torch.cat([
            torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None
            else (p.detach() * p.grad).flatten()
            for p in net.parameters()
        ])  # fmt: skip

    def claimed(self, net: nn.Module, families: Sequence[Family]) -> Tensor:
        """One row for each channel of each family."""
        shapes = {n: p.shape for n, p in net.named_parameters()}
        rows = []
        for family in families:
            for own in torch.eye(family.count, dtype=torch.float64):
                logs = family.log_factors(own, shapes)
                zero = torch.zeros((), dtype=torch.float64)
                moved = (logs.get(n, zero).expand(s).flatten() for n, s in shapes.items())
                rows.append(torch.cat(list(moved)))
        return torch.stack(rows) if rows else torch.zeros(0, len(self.names), dtype=torch.float64)

    def scaled(self, net: nn.Module, basis: Sequence[Mapping[str, Any]]) -> Tensor:
        """One row for each symmetry of whole weights."""
        rows = [
            torch.cat([
                torch.full((p.numel(),), float(v.get(n, 0)), dtype=torch.float64)
                for n, p in net.named_parameters()
            ])
            for v in basis
        ]  # fmt: skip
        return torch.stack(rows) if rows else torch.zeros(0, len(self.names), dtype=torch.float64)


def measured(
    net: nn.Module,
    draw: Callable[[torch.Generator], tuple[Tensor, ...]],
    columns: Columns | Entries,
) -> Tensor:
    """A basis, one vector per row, of all rescalings that leave the output alone to first order."""
    generator = torch.Generator().manual_seed(0)
    net = net.double()
    rows: list[Tensor] = []
    while len(rows) < 2 * len(columns.names) + 20:
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        for _ in range(6):
            net.zero_grad()
            out = net(*draw(generator))
            (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
            row = columns.derivatives(net)
            rows.append(row / row.norm().clamp_min(1e-300))
    _, s, vectors = torch.linalg.svd(torch.stack(rows), full_matrices=True)
    return vectors[int((s > 1e-9 * s[0]).sum()) :]


def rank(*some: Tensor) -> int:
    """Dimension of what some vectors span together."""
    return int(torch.linalg.matrix_rank(torch.cat(some), rtol=1e-7))
