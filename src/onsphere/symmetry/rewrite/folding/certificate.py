"""Try folds on numbers: all at once, then by halves until those that are wrong stand out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from onsphere._torch.execution import ModelError, OutputPicker
from onsphere.symmetry.numeric.certificate import relative_change
from onsphere.symmetry.numeric.group_testing import group_test
from onsphere.symmetry.rewrite.folding.kinds.batch_norms import BatchNormFold
from onsphere.symmetry.rewrite.folding.kinds.gains import GainFold
from onsphere.symmetry.rewrite.folding.targets import State
from onsphere.symmetry.rewrite.verification import outputs_in_float64, watched_inputs, widened

Fold = BatchNormFold | GainFold

EXACT = 1e-12
"""Relative change of the output in float64 up to which a fold is right."""
_ELSEWHERE = 1e-8
"""The same at random weights, where rounding may be amplified more."""
_ROUNDINGS = 30.0
"""How many times the effect of rounding all weights once is rounding, too."""


class Certificate:
    """A model at its own weights and at random ones, on the given inputs and on others.

    Args:
        model: the model, in the mode in which it is folded.
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors that must not change.
        state: its weights in float64.
        folds: what will be tried: their gains, shifts and statistics are drawn at random.
        before: outputs of the model as it was given.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: OutputPicker | None,
        state: State,
        folds: Sequence[Fold],
        before: Sequence[Tensor],
    ) -> None:
        self.model, self.output, self.state = model, output, state
        self._generator = torch.Generator().manual_seed(0)
        args, kwargs = tree_map(widened, (tuple(args), dict(kwargs)))
        random, drawn, outputs = self._elsewhere(folds, (args, kwargs))
        self._points: list[tuple[State, Any, float]] = [
            (random, drawn, _ELSEWHERE), (state, (args, kwargs), EXACT),
        ]  # fmt: skip
        self._baselines: dict[int, list[Tensor]] = {0: outputs, 1: list(before)}
        self._floors: dict[int, float] = {}

    def held(self, folds: Sequence[Fold]) -> tuple[list[Fold], list[Fold]]:
        """Return the folds that keep the function, and those that do not."""
        good = self._tested(folds, [])
        if good and len(good) < len(folds) and self._wrong(good) > 1.0:  # they meet each other
            kept_: list[Fold] = []
            for f in good:
                if self._wrong([*kept_, f]) <= 1.0:
                    kept_.append(f)
            good = kept_
        return good, [f for f in folds if f not in good]

    def also(self, done: Sequence[Fold], more: Sequence[Fold]) -> tuple[list[Fold], list[Fold]]:
        """Return which further folds keep the function after some that do."""
        good = self._tested(more, done)
        if good and self._wrong([*done, *good]) > 1.0:
            good = []
        return good, [f for f in more if f not in good]

    def _tested(self, folds: Sequence[Fold], done: Sequence[Fold]) -> list[Fold]:
        measured = group_test(folds, lambda some: self._wrong([*done, *some]), 1.0)
        return [f for f, m in zip(folds, measured, strict=True) if m <= 1.0]

    def applied(self, state: Mapping[str, Tensor], folds: Sequence[Fold]) -> State:
        """Return a state after some folds, one after the other."""
        now = dict(state)
        for f in folds:
            now |= f.applied(now)
        return now

    def _wrong(self, folds: Sequence[Fold]) -> float:
        """Return the largest change of the output, in units of what is allowed."""
        worst = 0.0
        for i, (state, (args, kwargs), allowed) in enumerate(self._points):
            try:
                after = self._outputs(self.applied(state, folds), args, kwargs)
            except (ModelError, RuntimeError, ValueError):
                return float("inf")
            change = relative_change(self._baseline(i), after)
            if change > allowed:
                allowed = max(allowed, _ROUNDINGS * self._floor(i))
            worst = max(worst, change / allowed)
            if worst > 1.0:
                return worst
        return worst

    def _baseline(self, i: int) -> list[Tensor]:
        if i not in self._baselines:
            state, (args, kwargs), _ = self._points[i]
            self._baselines[i] = self._outputs(state, args, kwargs)
        return self._baselines[i]

    def _floor(self, i: int) -> float:
        """Return by how much the output changes when every weight is rounded once more."""
        if i not in self._floors:
            state, (args, kwargs), _ = self._points[i]
            eps = torch.finfo(torch.float64).eps
            nudged = {
                n: t * (1 + eps * self._normal(t).sign()) if t.is_floating_point() else t
                for n, t in state.items()
            }
            after = self._outputs(nudged, args, kwargs)
            self._floors[i] = min(relative_change(self._baseline(i), after), 1e-4)
        return self._floors[i]

    def _outputs(self, state: State, args: Any, kwargs: Any) -> list[Tensor]:
        return outputs_in_float64(self.model, state, args, kwargs, self.output)

    def _elsewhere(self, folds: Sequence[Fold], given: Any) -> tuple[State, Any, list[Tensor]]:
        """Return random weights, other inputs if the model takes them, and what it makes there."""
        drawn = tree_map(self._drawn, given)
        for inputs in (drawn, given):
            try:
                random, outputs = self._at_random(folds, inputs)
            except (ModelError, RuntimeError, ValueError, IndexError):
                continue
            if all(bool(t.isfinite().any()) for t in outputs):
                return random, inputs, outputs
        return self.state, given, self._outputs(self.state, *given)

    def _drawn(self, t: Any) -> Any:
        """Draw floats of the same mean and spread; whole numbers change places."""
        if not isinstance(t, Tensor) or t.numel() < 2 or t.dtype == torch.bool:
            return t
        if t.is_floating_point():
            if not bool(t.isfinite().all()) or float(t.std()) == 0:
                return t
            return t.mean() + t.std() * self._normal(t)
        if t.is_complex() or (int(t.min()) >= 0 and int(t.max()) <= 1):
            return t
        order = torch.randperm(t.numel(), generator=self._generator).to(t.device)
        return t.reshape(-1)[order].reshape(t.shape)

    def _normal(self, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=self._generator, dtype=torch.float64).to(t.device)

    def _at_random(self, folds: Sequence[Fold], inputs: Any) -> tuple[State, list[Tensor]]:
        """Draw what folds move: gains of both signs, and shifts that a ReLU would notice.

        Statistics become those of the batch first, so that signals neither die nor explode.
        """
        now = dict(self.state)
        for f in folds:
            if f.kind != "batchnorm":
                now |= f.drawn(now, self._normal)
        owners = {f.path: f for f in folds if isinstance(f, BatchNormFold)}

        def measure(path: str, module: nn.Module, given: tuple[Any, ...]) -> None:
            f = owners.pop(path, None)
            if f is None:  # a norm that is used twice keeps the statistics of its first use
                return
            x = given[0].detach()
            axes = [a for a in range(x.ndim) if a != 1]
            variance = x.var(axes, correction=0)
            now[f.mean] = x.mean(axes)
            now[f.variance] = torch.where(variance > 0, variance, torch.ones_like(variance))
            now.update(f.drawn(now, self._normal))
            for own in f.own:
                getattr(module, own.rpartition(".")[2]).data.copy_(now[own])

        with watched_inputs({path: self.model.get_submodule(path) for path in owners}, measure):
            outputs = self._outputs({n: t.clone() for n, t in now.items()}, *inputs)
        return now, outputs
