r"""The same function, with channels whose scales a coarse grid likes.

Along a family of trades each channel may be scaled up in one weight and down in others. Which point
is best depends on what comes next: equal ranges or the least rounding error before quantization,
the least norm before training on or merging.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from onsphere._torch.execution import ModelError, OutputPicker, bare_name, inputs_of
from onsphere._torch.materialize import unwrapped
from onsphere.errors import OnsphereError, choice
from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.claims import Family
from onsphere.symmetry.numeric.certificate import relative_change
from onsphere.symmetry.rewrite.balancing.admitted import holding, meets_unseen
from onsphere.symmetry.rewrite.balancing.channel_scales import (
    EQUAL_RANGES,
    LEAST_NORM,
    Balance,
    State,
    balanced,
    moved,
)
from onsphere.symmetry.rewrite.equalizing.report import (
    Equalized,
    EqualizedFamily,
    EqualizeReport,
    Objective,
)
from onsphere.symmetry.rewrite.folding.kinds.batch_norms import batch_norms
from onsphere.symmetry.rewrite.folding.kinds.gains import is_norm
from onsphere.symmetry.rewrite.folding.surgery import write
from onsphere.symmetry.rewrite.modes import in_mode, mode_of
from onsphere.symmetry.rewrite.ranges import compared
from onsphere.symmetry.rewrite.reach import unreached
from onsphere.symmetry.rewrite.verification import (
    allowed_change,
    checked_tolerance,
    copied,
    outputs_as_it_computes,
    outputs_in_float64,
    refuse_moved,
    refuse_nothing_to_compare,
    refuse_shared_memory,
    refuse_without_values,
    wide_state,
    without_pruned,
)
from onsphere.symmetry.rewrite.weight_grid import Grid, total_loss

Modes = Literal["both", "current"]

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far on the way to equal ranges the least rounding error is looked for."""
_ROUNDS = 3


class EqualizeError(OnsphereError, ValueError):
    """A model cannot be equalized as given; the message says why."""


def equalize(
    model: nn.Module,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    objective: Objective = "range",
    bits: int = 8,
    grid: Grid = "tensor",
    modes: Modes = "both",
    inplace: bool = False,
    output: OutputPicker | None = None,
    tolerance: float | None = None,
) -> Equalized:
    r"""Rescale channels against each other, the function unchanged; verified before it returns.

    For a channel :math:`c` that is scaled by :math:`s_c` where it is written and by :math:`1/s_c`
    where it is read, with :math:`r^{(1)}_c` and :math:`r^{(2)}_c` the largest absolute entries
    there,

    .. math:: s_c = \sqrt{r^{(2)}_c / r^{(1)}_c}

    makes both ranges equal. Which channels these are is read off the families of scale symmetries
    of the model: two convolutions with ReLU between them, depthwise ones in the middle, values and
    outputs of attention, up and down projections, residual streams, for any architecture. Biases
    and running statistics move along. Families are balanced one after the other until none moves.

    Fold norms first (:func:`fold`): what a BatchNorm divides by has no range of its own.

    Args:
        model: any module with values. Compiled and data-parallel ones come back without their
            wrapper.
        args: inputs to verify on, as :func:`audit` takes them.
        kwargs: keyword inputs.
        objective: ``"range"`` makes the largest entry of each channel the same on both sides;
            ``"norm"`` finds the least total norm :math:`\sum_i |p_i|^2` that the families reach;
            ``"quantization"`` goes from where the model is towards equal ranges, family by
            family, as far as rounding the weights to whole numbers loses least: the sum over
            weights of the mean over output channels of :math:`\|w_c - q(w_c)\|^2 / \|w_c\|^2`,
            which never grows.
        bits: of these whole numbers, signed and symmetric, from 2 to 16.
        grid: what shares a step there: ``"tensor"``, ``"channel"`` (a row) or a number of entries
            within a row.
        modes: ``"both"`` keeps the function in training and in evaluation; ``"current"`` only in
            the mode that the model is in, which leaves more scales free where it holds norms with
            running statistics.
        inplace: change ``model`` itself instead of a copy; it is left as it was on any error.
        output: picks the tensors that must not change; all float tensors without.
        tolerance: largest relative change of the output to accept, as the model computes; rounding
            without, as for :func:`fold`.

    Returns:
        The model, and a report: what was rescaled, ranges and rounding losses before and after.

    Raises:
        EqualizeError: no inputs, no weights or NaN in them, a model that does not run in the other
            mode, an option out of its range, an output that would move further than the tolerance.

    References:
        Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*,
        ICCV 2019, section 4.1 (the closed form for a chain).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[0].mul_(100)
        >>> done = equalize(net, torch.randn(5, 4))
        >>> ranges = done.model[0].weight.abs().amax(1), done.model[2].weight.abs().amax(0)
        >>> torch.allclose(*ranges), [f.names for f in done.report.families]
        (True, [('0.weight', '2.weight')])
    """
    objective = cast(Objective, choice("objective", objective, get_args(Objective), EqualizeError))
    modes = cast(Modes, choice("modes", modes, get_args(Modes), EqualizeError))
    _check_grid(bits, grid)
    checked_tolerance(tolerance, EqualizeError)
    source = unwrapped(model)
    if args is None and not kwargs:
        raise EqualizeError("give inputs (args or kwargs): the result is verified on them")
    try:
        args, kwargs = inputs_of(source, args, kwargs)
        refuse_without_values(source, EqualizeError, "equalize")
        if inplace:
            refuse_shared_memory(source, EqualizeError)
        run = _Equalizing(source, args, kwargs, output, modes)
        changed, report = run.done(objective, bits, grid, tolerance)
    except ModelError as error:
        raise EqualizeError(str(error)) from error
    target = source if inplace else copied(source, EqualizeError)
    write(target, changed)
    return Equalized(target, report)


def _check_grid(bits: int, grid: Grid) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise EqualizeError(f"bits is a whole number from 2 to 16, got {bits!r}")
    whole = isinstance(grid, int) and not isinstance(grid, bool)
    if not (grid in ("tensor", "channel") or (whole and cast(int, grid) > 0)):
        raise EqualizeError(
            f"grid is 'tensor', 'channel' or a number of entries that share a step, got {grid!r}"
        )


class _Equalizing:
    """One run of equalizing a model, which is not changed."""

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: OutputPicker | None,
        modes: Modes,
    ) -> None:
        self.model, self.args, self.kwargs, self.output = model, args, kwargs, output
        here = model.training
        # In training mode first: what a batch divides by is no weight there, and what estimates it
        # moves along, which evaluation needs.
        self.modes = [here] if modes == "current" else [True, False]
        self.state = wide_state(model)
        self.parameters = {n for n, _ in model.named_parameters()}
        self.unreached = unreached(model, args, kwargs)
        self.before = {training: self._outputs(self.state, training) for training in self.modes}
        for outputs in self.before.values():
            refuse_nothing_to_compare(outputs, EqualizeError)

    def done(
        self, objective: Objective, bits: int, grid: Grid, tolerance: float | None
    ) -> tuple[State, EqualizeReport]:
        """Return what changes, in float64, and the report."""
        balance = LEAST_NORM if objective == "norm" else EQUAL_RANGES
        families = self._families(balance)
        matrices = [n for n in sorted(self.parameters) if self.state[n].ndim > 1]
        if isinstance(grid, int):
            matrices = [n for n in matrices if self.state[n][0].numel() % grid == 0]
        acting = without_pruned(self.model, self.state)
        before = self.state if objective == "norm" else acting
        amounts = balanced(before, families, balance, self.parameters)
        if objective == "quantization":
            amounts = _least_loss(before, families, amounts, matrices, bits, grid)
        used = [(f, a) for f, a in zip(families, amounts, strict=True) if bool(a.any())]
        changed = moved(self.state, used)
        now = without_pruned(self.model, {**self.state, **changed})
        exact, real, own = self._verified(changed, tolerance)
        report = EqualizeReport(
            objective, bits, grid,
            tuple(
                EqualizedFamily(f.names, f.count, float(_largest(f, a).exp()))
                for f, a in used
            ),
            tuple(
                compared(n, acting[n], now[n], bits, grid)
                for n in matrices if n in changed
            ),
            self._norm(self.state), self._norm({**self.state, **changed}),
            tuple(map(mode_of, self.modes)), exact, real, own,
            len(families), tuple(self.unreached),
            in_training=len(self.modes) > 1 and bool(batch_norms(self.model)),
        )  # fmt: skip
        return changed, report

    def _families(self, balance: Balance) -> list[Family]:
        """Return the families to move along: those that hold in every mode that shall stay."""
        # Between two maps may stand a norm that was folded and is there as the identity: its gain
        # stays, so that what is before it trades with what is behind it.
        held = _gains(self.model) if balance is EQUAL_RANGES else ()
        with in_mode(self.model, self.modes[0]):
            found = channel_symmetries(
                self.model, self.args, self.kwargs, output=self.output, held=held
            )
        known = [f for f in found if all(n in self.state for n in f.names)]
        asked = [f for f in known if f.exact and balance.applies(f, self.parameters, self.state)]
        asked = [f for f in asked if not meets_unseen(f, self.state, self.unreached)]
        for training in self.modes:
            before, after = self.before[training], partial(self._after, training)
            asked = holding(asked, self.state, before, after)
        return asked

    def _after(self, training: bool, changed: State) -> list[Tensor]:
        return self._outputs({**self.state, **changed}, training)

    def _outputs(self, state: State, training: bool) -> list[Tensor]:
        with self._in(training):
            return outputs_in_float64(self.model, state, self.args, self.kwargs, self.output)

    def _verified(
        self, changed: State, tolerance: float | None
    ) -> tuple[float, float, torch.dtype]:
        """Compare the outputs in every mode; raise where they moved too far."""
        work = copied(self.model, EqualizeError)
        write(work, changed)
        exact, real, dtype = 0.0, 0.0, torch.float32
        for training in self.modes:
            in_float64 = relative_change(self.before[training], self._after(training, changed))
            with self._in(training), in_mode(work, training):
                own = outputs_as_it_computes(self.model, self.args, self.kwargs, self.output)
                now = outputs_as_it_computes(work, self.args, self.kwargs, self.output)
            change, dtype = relative_change(own, now), own[0].dtype
            allowed = allowed_change(own, relative_change(self.before[training], own), tolerance)
            where = f"in {mode_of(training)} mode "
            refuse_moved(EqualizeError, change, in_float64, allowed, tolerance, where)
            exact, real = max(exact, in_float64), max(real, change)
        return exact, real, dtype

    def _in(self, training: bool) -> Any:
        return in_mode(self.model, training)

    def _norm(self, state: Mapping[str, Tensor]) -> float:
        return sum(float((state[n].abs() ** 2).sum()) for n in self.parameters) ** 0.5


def _gains(model: nn.Module) -> set[str]:
    """Return the names of the gains of norms."""
    found = ((path, m._parameters.get("weight")) for path, m in model.named_modules())
    return {
        bare_name(f"{path}.weight") for path, p in found
        if path and p is not None and p.ndim == 1 and is_norm(model, path)
    }  # fmt: skip


def _least_loss(
    state: State,
    families: Sequence[Family],
    towards: Sequence[Tensor],
    names: Sequence[str],
    bits: int,
    grid: Grid,
) -> list[Tensor]:
    """Return how far to go so that rounding loses least, family by family, from either end."""
    nowhere = [torch.zeros_like(t) for t in towards]
    ends = {
        total_loss({**state, **moved(state, zip(families, t, strict=True))}, names, bits, grid): t
        for t in (towards, nowhere)
    }
    amounts = list(ends[min(ends)])
    now = {**state, **moved(state, zip(families, amounts, strict=True))}
    for _ in range(_ROUNDS):
        changed = False
        for i, family in enumerate(families):
            touched = [n for n in family.names if n in names]
            tried: dict[float, tuple[Tensor, State]] = {
                total_loss(now, touched, bits, grid): (amounts[i], {})
            }
            for share in _SHARES:
                there = share * towards[i]
                after = moved(now, [(family, there - amounts[i])])
                lost = total_loss({**now, **after}, touched, bits, grid)
                tried.setdefault(lost, (there, after))
            amounts[i], after = tried[min(tried)]
            now |= after
            changed = changed or bool(after)
        if not changed:
            break
    return amounts


def _largest(family: Family, amounts: Tensor) -> Tensor:
    steepest = max(abs(float(s.exponent)) for s in family.slices)
    return steepest * amounts.abs().max()
