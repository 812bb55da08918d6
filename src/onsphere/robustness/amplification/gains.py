"""The gains of a batch of perturbations, measured at every layer on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onsphere.robustness.amplification.effective_layers import Effective
from onsphere.robustness.amplification.layer_trace import Call, LayerTraceError, watched
from onsphere.robustness.attacks.threat_model import per_example


@dataclass(frozen=True)
class Step:
    """One layer at the examples as they are.

    Args:
        call: which layer, and which run of it.
        given: what it was given.
        made: what it returned.
    """

    call: Call
    given: Tensor
    made: Tensor


def passed(
    model: nn.Module,
    x: Tensor,
    layers: Sequence[str] = (),
    note: Callable[[str], object] | None = None,
) -> tuple[list[Step], Any]:
    """Run a model and return every layer that its input passed, and the result.

    Layers whose input or output has no leading axis of the batch are left out, with a note.

    Args:
        model: a module that takes ``x`` alone.
        x: inputs.
        layers: names of modules to look at; without, those inside which no other module runs.
        note: told in a line what was left out.
    """
    steps: list[Step] = []

    def seen(call: Call, given: Tensor, made: Tensor) -> None:
        if _per_example(x, given, made):
            steps.append(Step(call, given, made.clone()))
            return
        shape = tuple((made if given.shape[:1] == x.shape[:1] else given).shape)
        if note is not None:
            note(f"{call.label} left out: shape {shape} does not begin with the {len(x)} examples")

    with torch.no_grad(), watched(model, seen, layers=layers, skipped=note):
        result = model(x)
    return steps, result


def gains(
    model: nn.Module,
    steps: Sequence[Step],
    x: Tensor,
    delta: Tensor,
    effective: Mapping[int, Effective],
    layers: Sequence[str] = (),
) -> list[dict[str, Tensor]]:
    """Run a model on perturbed examples and measure every layer against what it did without.

    Args:
        model: the module of ``steps``.
        steps: what :func:`passed` returned for ``x``.
        x: inputs.
        delta: perturbations.
        effective: effective layers by the number of the step that they begin at; those that are
            not affine hold for the first examples only.
        layers: as for :func:`passed`.

    Returns:
        Per step, measure -> one number per example, in float64; nan where there is nothing to
        divide by.

    Raises:
        LayerTraceError: the perturbed examples pass other layers.
    """
    measured: list[dict[str, Tensor]] = []
    arrived: list[Tensor] = []
    size = _size(delta)
    share = _ratio(size, _size(x))

    def seen(call: Call, given: Tensor, made: Tensor) -> None:
        if not _per_example(x, given, made):
            return
        i = len(measured)
        if i == len(steps) or steps[i].call != call or steps[i].made.shape != made.shape:
            raise LayerTraceError(
                f"the perturbed examples take another path through the model, from "
                f"{call.label!r} on: choose `layers` that run for all"
            )
        change, came = made - steps[i].made, given - steps[i].given
        grown = _size(change)
        arrived.append(_size(came))
        found = {
            "absolute": _ratio(grown, size),
            "incremental": _ratio(grown, arrived[i]),
            "relative": _ratio(_ratio(grown, _size(steps[i].made)), share),
        }
        if i in effective:
            found["alignment"] = _alignment(came, effective[i])
            if effective[i].end == i:
                found["effective"] = found["incremental"]
        measured.append(found)
        start = next((k for k, e in effective.items() if e.end == i > k), None)
        if start is not None:
            measured[start]["effective"] = _ratio(grown, arrived[start])

    with torch.no_grad(), watched(model, seen, layers=layers):
        model(x + delta)
    if len(measured) != len(steps):
        raise LayerTraceError(
            f"the perturbed examples pass {len(measured)} layers, the others {len(steps)}: choose "
            "`layers` that run for all"
        )
    return measured


def _per_example(x: Tensor, *others: Tensor) -> bool:
    return all(t.shape[:1] == x.shape[:1] for t in others)


def _size(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t.detach().flatten(1), dim=1, dtype=torch.float64)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, torch.nan)


def _alignment(came: Tensor, layer: Effective) -> Tensor:
    """Return |cos| with the top right singular vector, where that is known."""
    cosines = came.new_full(came.shape[:1], torch.nan, dtype=torch.float64)
    known = slice(None) if layer.affine else slice(len(layer.vectors))
    rows, vectors = came[known].double(), layer.vectors.double()
    units = rows / per_example(_size(rows), rows)
    cosines[known] = (units * vectors).flatten(1).sum(1).abs()
    return cosines
