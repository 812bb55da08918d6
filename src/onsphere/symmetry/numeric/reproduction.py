"""Is the run in float64 the model? Compared before anything is certified with it.

Certificates look at a run in which types, and some eps, are changed. With its own eps, at its own
weights and inputs, that run must give what the model gives, to the rounding of the model's types.
Where it does not, the first operation that differs is found, and nothing may be claimed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from onsphere._torch.copies import copy_of
from onsphere._torch.execution import (
    ModelError,
    bare_name,
    call,
    gradients_as_used,
    leaf_as,
    module_paths,
    plain_execution,
)
from onsphere._torch.operations import OperationsMode
from onsphere._torch.substitution import kept, unchanged
from onsphere.symmetry.exact.overloads import short_name
from onsphere.symmetry.exact.trace import Call
from onsphere.symmetry.exact.writes import writes_taken_back
from onsphere.symmetry.numeric.certificate import relative_change
from onsphere.symmetry.numeric.float64_mode import wide
from onsphere.symmetry.numeric.near_zero import SILENT, Origins, same_before_picks
from onsphere.symmetry.numeric.probe import Point, Probe

_SLACK = 100.0
"""How many times the change that rounding the weights makes may stand between the two runs."""
_MOST = 0.1
"""Where rounding changes outputs by more than a tenth of this, it may explain ten times as much."""
_TOO_ROUGH = 0.3
"""Where rounding changes outputs by more, nothing can be compared in the model's types."""
_IN_FLOAT64 = 1e-6
"""Largest relative difference to the model as a float64 model: it may still cast to float32."""


def difference(probe: Probe, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Return in words where the run in float64 is not the model, or ``None`` where it is.

    Where rounding decides what comes out (equal tokens, normalized over time), other inputs of the
    same kinds are taken.

    Args:
        probe: the run in float64.
        args: the inputs as they were given.
        kwargs: keyword inputs as they were given.
    """
    given = Call(args, kwargs)
    try:
        measured = ((c, at, _rounding(probe, at)) for c, at in _calls(probe, given))
        found = next((x for x in measured if x[-1] <= _TOO_ROUGH), None)
    except ModelError as error:
        return str(error)
    if found is None:
        return None if _same_in_float64(probe, given) else "rounding decides what comes out"
    compared, point, rounding = found
    change = relative_change(_outputs(probe, compared), probe.baseline(point, real_eps=True))
    tolerance = min(_SLACK * rounding, max(_MOST, 10 * rounding))
    if change <= tolerance or _agrees_before_picks(probe, compared, tolerance):
        return None
    return _first_difference(probe, compared, max(rounding, 1e-6)) or (
        f"its outputs differ by {change:.1e} where rounding explains {rounding:.1e} "
        "(if this is a loss near 0, audit the logits instead)"
    )


def _agrees_before_picks(probe: Probe, call_on: Call, tolerance: float) -> bool:
    """Return whether the runs agree but for the smallest numbers that a loss picks."""
    with Origins() as made:
        own = _outputs(probe, call_on)
    with Origins() as made_there:
        ours = probe.outputs(probe.on(call_on), real_eps=True)
    return len(own) == len(ours) and all(
        same_before_picks((a, made), (b, made_there), tolerance)
        for a, b in zip(own, ours, strict=True)
    )


def _calls(probe: Probe, given: Call) -> Iterator[tuple[Call, Point]]:
    """Yield the given inputs, then others, in the types of those given and in float64."""
    yield given, probe.given()
    for turn in range(4):
        other = probe.others_like(given, turn)
        yield other, probe.on(other)


def _outputs(probe: Probe, call_on: Call) -> list[Tensor]:
    """Run the model as it is, in its own types."""
    model = probe.model
    parameters = dict(model.named_parameters())
    state = {**parameters, **dict(model.named_buffers())}
    copies = {n: kept(t) for n, t in state.items() if n not in parameters}
    copies |= {n: leaf_as(state[n], kept(state[n])) for n in probe.overwritten}
    inputs = (call_on.args, dict(call_on.kwargs))
    args, kwargs = tree_map(lambda t: kept(t) if isinstance(t, Tensor) else t, inputs)
    state = {n: leaf_as(t, t.detach()) for n, t in state.items()}
    autograd = gradients_as_used(model, probe.traced.differentiates)
    own = writes_taken_back(state.values())
    with plain_execution(call_on.seed), autograd, unchanged(probe.traced.outside), own:
        result = call(model, {**state, **copies}, args, kwargs)
        return _compared(probe, result)


def _compared(probe: Probe, result: Any) -> list[Tensor]:
    """Return what a run gave, in float64."""
    return [wide(t).detach() for t in probe.outputs_in(result)]


def _rounding(probe: Probe, point: Point) -> float:
    """Return how much outputs change when weights are rounded as the model rounds."""
    eps = max(probe.traced.coarsest, 1e-12)
    before = probe.baseline(point, real_eps=True)
    draws = 1 if probe.large else 2  # of many weights each draw tells the same
    moved = [probe.outputs(probe.nudged(point, eps), real_eps=True) for _ in range(draws)]
    return max(eps, *(relative_change(before, m) for m in moved))


def _same_in_float64(probe: Probe, call_on: Call) -> bool:
    """Return whether the model, made a float64 model, gives the same."""
    usual = torch.get_default_dtype()
    try:
        model = copy_of(probe.model).double()
        args, kwargs = tree_map(_double, (call_on.args, dict(call_on.kwargs)))
        torch.set_default_dtype(torch.float64)
        if not probe.traced.differentiates:
            model.requires_grad_(False)
        autograd = gradients_as_used(model, probe.traced.differentiates)
        with plain_execution(call_on.seed), autograd:
            result = call(model, {}, args, kwargs)
            outputs = _compared(probe, result)
    except Exception:
        return False  # not every model runs as a float64 model
    finally:
        torch.set_default_dtype(usual)
    return relative_change(probe.real_baseline(), outputs) <= _IN_FLOAT64


def _double(t: Any) -> Any:
    return t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t


class _Record(OperationsMode):  # type: ignore[no-untyped-call]
    """Notes of every operation where it ran, and two numbers that tell its results apart."""

    def __init__(self) -> None:
        super().__init__()
        self.where = ""
        self.steps: list[tuple[tuple[str, tuple[int, ...]], str, tuple[float, float]]] = []

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        name = short_name(func)
        for t in tree_leaves(result)[:1]:
            if isinstance(t, Tensor) and t.is_floating_point() and name not in SILENT:
                self.steps.append(((name, tuple(t.shape)), self.where, _fingerprint(t)))
        return result


def _fingerprint(t: Tensor) -> tuple[float, float]:
    x = t.detach().double().flatten()
    x = torch.where(x.isfinite() & (x.abs() < 1e30), x, 0.0)
    waves = torch.arange(len(x), dtype=torch.float64, device=x.device).mul(0.7).cos()
    return float(x.norm()), float(x @ waves)


def _first_difference(probe: Probe, call_on: Call, rounding: float) -> str | None:
    """Return the first operation whose results differ by more than rounding."""
    with _recorded(probe) as own:
        _outputs(probe, call_on)
    with _recorded(probe) as ours:
        probe.outputs(probe.on(call_on), real_eps=True)
    keys = [s[0] for s in own.steps], [s[0] for s in ours.steps]
    for i, j, n in SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
        for (key, where, a), (_, _, b) in zip(
            own.steps[i : i + n], ours.steps[j : j + n], strict=True
        ):
            size = max(a[0], b[0], 1e-300)
            if max(abs(a[0] - b[0]), abs(a[1] - b[1])) > _SLACK * max(rounding, 1e-5) * size:
                return f"aten::{key[0]}" + (f" in module {where!r}" if where else "")
    return None


@contextmanager
def _recorded(probe: Probe) -> Iterator[_Record]:
    record = _Record()

    def enter(path: str) -> None:
        record.where = bare_name(path)

    with module_paths(probe.model, enter), record:
        yield record
