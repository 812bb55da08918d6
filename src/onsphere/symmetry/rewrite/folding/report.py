"""What a fold did: what was folded, what was not and why, and how far the output moved."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import nn

from onsphere.symmetry.rewrite.folding.targets import listed
from onsphere.symmetry.rewrite.ranges import WeightRanges


@dataclass(frozen=True)
class FoldedPart:
    """Something that was folded.

    Args:
        name: the module, or the weight.
        kind: ``"batchnorm"``, ``"gain"``, ``"scale"``, ``"centering"`` or ``"weight"``.
        into: the modules that it went into.
        note: what stayed behind, and why.
    """

    name: str
    kind: str
    into: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        """Return it as a line of text."""
        note = f" ({self.note})" if self.note else ""
        if self.kind == "centering":
            becomes = "needs no centring" if self.note else "becomes RMSNorm"
            return f"{self.name} {becomes}: means out of {listed(self.into)}{note}"
        return f"{self.name} -> {listed(self.into)}{note}"


@dataclass(frozen=True)
class KeptPart:
    """Something that could not be folded.

    Args:
        name: the module, or the weight.
        kind: as for a folded part.
        reason: why it stays.
    """

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        """Return it as a line of text."""
        stays = "still centres" if self.kind == "centering" else "stays"
        return f"{self.name} {stays}: {self.reason}"


@dataclass(frozen=True)
class FoldReport:
    """What was folded, what was not and why, and how far the output moved.

    Args:
        folded: what was.
        kept: what was not.
        removed: modules that became the identity and were replaced by it.
        change_in_float64: relative change of the output on the given inputs, in float64.
        change: the same as the model computes.
        dtype: the type of its outputs.
        weights: all weights of two or more axes that changed, before and after.
    """

    folded: tuple[FoldedPart, ...]
    kept: tuple[KeptPart, ...]
    removed: tuple[str, ...]
    change_in_float64: float
    change: float
    dtype: torch.dtype
    weights: tuple[WeightRanges, ...] = ()

    def to_html(self, path: str | Path) -> None:
        """Write a page with pictures; needs the extra ``onsphere[study]``."""
        from onsphere.report import html
        from onsphere.symmetry.rewrite.folding.page import document

        html.write(document(self), path)

    def count(self, kind: str) -> tuple[int, int]:
        """Return how many parts of a kind were folded, and how many there are."""
        done = sum(p.kind == kind for p in self.folded)
        return done, done + sum(p.kind == kind for p in self.kept)

    def __str__(self) -> str:
        """Return it as lines of text."""
        lines = []
        for kind, words in _WORDS.items():
            done, there = self.count(kind)
            if there:
                lines.append(f"{words}: {done} of {there} folded")
        if not lines:
            lines.append("nothing to fold")
        if self.removed:
            lines.append(f"{len(self.removed)} modules became the identity and were replaced")
        lines += [f"  {p}" for p in (*self.folded, *self.kept)]
        kind = str(self.dtype).removeprefix("torch.")
        lines.append(
            f"the output moved by {self.change_in_float64:.1e} of its size in float64, and by "
            f"{self.change:.1e} in {kind}"
        )
        return "\n".join(lines)


_WORDS = {
    "batchnorm": "norms with running statistics",
    "gain": "gains of norms",
    "scale": "scales of layers",
    "centering": "centring of LayerNorm",
    "weight": "computed weights",
}


@dataclass(frozen=True)
class Folded:
    """A folded model, and what was done to it.

    Args:
        model: the model.
        report: what was folded, what not and why.
    """

    model: nn.Module
    report: FoldReport

    def __repr__(self) -> str:
        found = f"{len(self.report.folded)} norms folded, {len(self.report.kept)} kept"
        return f"<Folded {type(self.model).__name__}: {found}; print() shows all>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        """Return the report as text."""
        return str(self.report)
