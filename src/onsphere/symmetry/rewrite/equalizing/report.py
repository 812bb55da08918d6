"""What equalizing did: the channels that were rescaled, and the weights before and after."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from onsphere.symmetry.rewrite.folding.targets import listed
from onsphere.symmetry.rewrite.ranges import WeightRanges
from onsphere.symmetry.rewrite.weight_grid import Grid

Objective = Literal["range", "norm", "quantization"]


@dataclass(frozen=True)
class EqualizedFamily:
    """Channels that were rescaled.

    Args:
        names: the weights and buffers that they are slices of.
        count: how many channels there are.
        largest_factor: the factor furthest from 1, or its inverse: 1 or more.
    """

    names: tuple[str, ...]
    count: int
    largest_factor: float


@dataclass(frozen=True)
class EqualizeReport:
    """What was rescaled, what it does to the weights, and how far the output moved.

    Args:
        objective: what was asked for.
        bits: of the whole numbers that the losses are of.
        grid: which entries share a step there.
        families: what was rescaled.
        weights: all weights of two or more axes that changed.
        norm_before: of all parameters together.
        norm_after: the same afterwards.
        modes: in which the output was compared.
        change_in_float64: the largest relative change of the output on the given inputs.
        change: the same as the model computes.
        dtype: the type of its outputs.
        asked: how many families there are that may be rescaled.
        unreached: weights that the inputs do not reach; what may meet them stays.
        in_training: whether norms with running statistics were asked to keep the function in
            training mode, where they divide by their batch.
    """

    objective: Objective
    bits: int
    grid: Grid
    families: tuple[EqualizedFamily, ...]
    weights: tuple[WeightRanges, ...]
    norm_before: float
    norm_after: float
    modes: tuple[str, ...]
    change_in_float64: float
    change: float
    dtype: torch.dtype
    asked: int = 0
    unreached: tuple[str, ...] = ()
    in_training: bool = False

    def to_html(self, path: str | Path) -> None:
        """Write a page with pictures; needs the extra ``onsphere[study]``."""
        from onsphere.report import html
        from onsphere.symmetry.rewrite.equalizing.page import document

        html.write(document(self), path)

    def __str__(self) -> str:
        """Return it as lines of text."""
        left = ""
        if self.unreached:
            left = (
                f"these inputs do not reach {listed(self.unreached)}: what may meet them stays; "
                "give inputs that do"
            )
        if not self.families and self.asked:
            gain = "rounding gains nothing" if self.objective == "quantization" else "all balanced"
            return "\n".join([f"nothing to change: {gain}, of {self.asked} families", left]).strip()
        if not self.families:
            said = "nothing to equalize: no channel can be rescaled against another"
            if self.in_training:
                said += (
                    " in both modes; norms with running statistics stand between them, which "
                    "divide by their batch in training: fold them, or keep the function in the "
                    "current mode only (modes='current')"
                )
            return "\n".join([said, left]).strip()
        lines = [
            f"{len(self.families)} families of channels rescaled, {len(self.weights)} weights",
            f"  {'weight':<40} {'largest / smallest range':>26} {f'lost by int{self.bits}':>22}",
        ]
        for w in self.weights:
            one, other = w.spread
            lines.append(
                f"  {w.name:<40} {f'{one:.3g} -> {other:.3g}':>26} "
                f"{f'{w.loss_before:.1e} -> {w.loss_after:.1e}':>22}"
            )
        lines += [left] if left else []
        lines.append(f"norm of all parameters: {self.norm_before:.6g} -> {self.norm_after:.6g}")
        kind = str(self.dtype).removeprefix("torch.")
        lines.append(
            f"the output moved by {self.change_in_float64:.1e} of its size in float64, and by "
            f"{self.change:.1e} in {kind} ({' and '.join(self.modes)} mode)"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Equalized:
    """An equalized model, and what was done to it.

    Args:
        model: the model.
        report: what was rescaled.
    """

    model: nn.Module
    report: EqualizeReport

    def __repr__(self) -> str:
        found = f"{len(self.report.families)} families of channels"
        return f"<Equalized {type(self.model).__name__}: {found}; print() shows all>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        """Return the report as text."""
        return str(self.report)
