r"""How much each layer of a model amplifies a perturbation of its input.

For an input :math:`x`, a perturbation :math:`\delta`, and the output :math:`h_l` of layer
:math:`l`, with :math:`\delta h_l = h_l(x+\delta) - h_l(x)`:

==============  ==============================================================================
absolute        :math:`|\delta h_l| / |\delta|`
incremental     :math:`|\delta h_l| / |\delta h_{in}|`, by what this layer itself was given
relative        :math:`(|\delta h_l|/|h_l|) / (|\delta|/|x|)`
effective       as incremental, of the layer together with the normalization after it
alignment       :math:`|\cos(\delta h_{in}, v)|`, :math:`v` its top right singular vector
==============  ==============================================================================

All lengths are Euclidean. Absolute gains between a layer and its normalization scale with a weight
whose scale does nothing. So the same is measured on a rescaled copy of the model that computes the
same function: what moves there is bookkeeping.

Source: the measures follow Galloway et al., 2019 (arXiv 1905.02161) and Sun et al., AAAI 2020,
section on norm growth; the control is ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from onsphere.errors import choice
from onsphere.robustness.amplification.effective_layers import (
    Effective,
    effective_layers,
    weight_norm,
)
from onsphere.robustness.amplification.gains import Step, gains, passed
from onsphere.robustness.amplification.layer_trace import (
    Call,
    LayerTraceError,
    as_in_use,
    first_tensor,
    inside,
)
from onsphere.robustness.amplification.margin import MarginSlopes, margin_slope
from onsphere.robustness.amplification.result import Amplification, Control, LayerGain, Quantiles
from onsphere.robustness.attacks.threat_model import Norm, lengths

Rescaled = nn.Module | Callable[[nn.Module], nn.Module]


def amplification(
    model: nn.Module,
    x: Tensor,
    delta: Tensor,
    *,
    y: Tensor | None = None,
    norm: Norm = "l2",
    layers: Sequence[str] = (),
    control: Rescaled | None = None,
    draws: int = 4,
    probes: int = 4,
    n_power_iterations: int = 100,
    batch_size: int = 250,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Amplification:
    r"""Follow perturbations through a model, layer by layer.

    Every example is measured by itself and the result holds quantiles over them. Beside
    ``delta`` stand random perturbations: Gaussian directions, each of the length that ``delta``
    has at its example. The largest singular value is that of the *effective* layer, the linear
    map together with the normalization after it, found by power iteration on real inputs.

    Args:
        model: a module that takes ``x`` alone. It is run in evaluation mode and left as it was:
            its modes, buffers, parameters and gradients.
        x: inputs, shape ``(batch, ...)``, floating point.
        delta: perturbations of the same shape, say adversarial inputs minus ``x``. Examples at
            which it is 0 are left out.
        y: labels, for the margin; without, the model's own decisions at ``x``.
        norm: the norm in which an attacker is bounded: slopes are in its dual.
        layers: names of modules to measure at; without, every module inside which no other runs.
        control: a copy of the model that was rescaled without changing its function,
            or a function that makes one. Best rescaled by powers of two, which do not round
            (``onsphere.symmetry.rescaled`` does, for any model).
        draws: random perturbations per example.
        probes: at how many examples singular values are taken where they differ (LayerNorm and
            its like; with BatchNorm in evaluation mode, or none, they do not).
        n_power_iterations: the most steps of power iteration.
        batch_size: how many examples are measured at once; activations of so many are held.
        seed: of the random perturbations and of power iteration.
        progress: told in words what is being done.

    Returns:
        Gains per layer, the slope at the logits, and what the control moved. It prints as a table.

    Raises:
        LayerTraceError: there is nothing to follow: shapes that do not fit, a perturbation of 0, no
            layer, a layer that is not there, another path for the perturbed input.
        ValueError: an unknown norm, or labels that do not fit the logits.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = net[0].weight.data.copy_(3 * torch.eye(4))
        >>> found = amplification(net, torch.ones(5, 4), 0.1 * torch.eye(5, 4) + 0.1)
        >>> [layer.name for layer in found.layers]
        ['0', '1', '2']
        >>> round(found.layers[0].adversarial["absolute"].middle, 4)
        3.0
    """
    norm = cast(Norm, choice("norm", norm, get_args(Norm)))
    x, delta, y, unchanged = _checked(x, delta, y)
    settings = _Settings(norm, tuple(layers), draws, seed, batch_size, probes, n_power_iterations)
    tell = progress or _say_nothing
    tell("following the perturbations")
    found = _measured(model, x, delta, y, settings)
    result = Amplification(
        model=type(inside(model)).__name__,
        examples=len(x),
        unchanged=unchanged,
        draws=draws,
        norm=norm,
        size=_known(lengths(delta)),
        share=Quantiles.of(lengths(delta) / lengths(x)),
        layers=[_layer(found, i) for i in range(len(found.calls))],
        notes=found.notes,
        **_at_logits(found.slopes),
    )
    if control is None:
        return result
    tell("following them through a rescaled copy")
    copy = control if isinstance(control, nn.Module) else control(model)
    moved = _measured(copy, x, delta, y, replace(settings, draws=0))
    if [c.label for c in moved.calls] != [c.label for c in found.calls]:
        raise LayerTraceError(
            "the rescaled copy runs other layers than the model; give a true copy"
        )
    return _controlled(result, found, moved)


def _say_nothing(_: str) -> None:
    pass


@dataclass(frozen=True)
class _Settings:
    norm: Norm
    layers: tuple[str, ...]
    draws: int
    seed: int
    batch_size: int
    probes: int
    n_power_iterations: int


@dataclass(frozen=True)
class _Found:
    """What was measured, per example.

    Args:
        calls: the layers.
        effective: the linear ones among them, by their place in ``calls``.
        outputs: what the model returned at the examples.
        adversarial: per layer, measure -> one number per example.
        random: the same, over all draws.
        slopes: at the logits; ``None`` where the model returns none.
        notes: what could not be measured.
    """

    calls: list[Call]
    effective: dict[int, Effective]
    outputs: Tensor
    adversarial: list[dict[str, Tensor]]
    random: list[dict[str, Tensor]]
    slopes: MarginSlopes | None
    notes: list[str]


def _checked(
    x: Tensor, delta: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Return the examples with a perturbation, and how many have none."""
    for what, given in (("inputs", x), ("perturbations", delta), ("labels", y)):
        if not isinstance(given, Tensor | None):
            raise LayerTraceError(f"{what} are a tensor, got a {type(given).__name__}")
    if not x.is_floating_point() or x.ndim < 2 or x.shape != delta.shape:
        raise LayerTraceError(
            "inputs are floating point, shape (batch, ...), and perturbations are like them: got "
            f"{x.dtype} {tuple(x.shape)} and {delta.dtype} {tuple(delta.shape)}"
        )
    if y is not None and y.shape != x.shape[:1]:
        raise LayerTraceError(
            f"one label per example: got {len(x)} inputs, {tuple(y.shape)} labels"
        )
    x, delta = x.detach(), delta.detach().to(x)
    moved = delta.flatten(1).ne(0).any(1)
    if not bool(moved.any()):
        raise LayerTraceError("every perturbation is 0: there is nothing to follow")
    return x[moved], delta[moved], None if y is None else y[moved], int((~moved).sum())


# --- measuring ------------------------------------------------------------------------------------


def _measured(
    model: nn.Module, x: Tensor, delta: Tensor, y: Tensor | None, settings: _Settings
) -> _Found:
    notes: dict[str, None] = {}  # in order, each once
    with as_in_use(model):
        first, _ = passed(model, x[: settings.probes], settings.layers, notes.setdefault)
        if not first:
            raise LayerTraceError("the input passes no layer that can be measured")
        calls = [step.call for step in first]
        found = effective_layers(
            calls, [step.given for step in first], n_power_iterations=settings.n_power_iterations
        )
        effective = {layer.start: layer for layer in found}
        outputs, adversarial, random = _followed(model, x, delta, calls, effective, settings, notes)
        slopes = _slopes(model, x, y, outputs, settings, notes)
    return _Found(calls, effective, outputs, adversarial, random, slopes, list(notes))


def _followed(
    model: nn.Module,
    x: Tensor,
    delta: Tensor,
    calls: list[Call],
    effective: dict[int, Effective],
    settings: _Settings,
    notes: dict[str, None],
) -> tuple[Tensor, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return the outputs, and the measures of the perturbations and of random ones."""
    generator = torch.Generator().manual_seed(settings.seed)
    outputs, adversarial, random = [], [], []
    here = effective
    for start in range(0, len(x), settings.batch_size):
        at, by = (t[start : start + settings.batch_size] for t in (x, delta))
        steps, result = passed(model, at, settings.layers)
        if [step.call for step in steps] != calls:
            raise LayerTraceError("the model takes different paths for different examples")
        outputs.append(first_tensor(result))
        if not start:
            _check_determined(model, steps, at, settings.layers, notes)
        adversarial.append(gains(model, steps, at, by, here, settings.layers))
        for _ in range(settings.draws):
            drawn = _random_like(by, generator)
            random.append(gains(model, steps, at, drawn, here, settings.layers))
        # Jacobians that depend on the example were taken at the first ones.
        here = {i: replace(e, vectors=e.vectors[: e.affine]) for i, e in effective.items()}
    kept = [o for o in outputs if o is not None]
    return torch.cat(kept) if kept else x.new_zeros(0), _joined(adversarial), _joined(random)


def _check_determined(
    model: nn.Module, steps: list[Step], x: Tensor, layers: Sequence[str], notes: dict[str, None]
) -> None:
    """Note the first layer that gives another output for the same input."""
    again, _ = passed(model, x, layers)
    for before, after in zip(steps, again, strict=False):
        off = float((after.made - before.made).double().norm())
        if off > 1e-5 * float(before.made.double().norm()):
            notes.setdefault(
                f"{before.call.label} returns another output for the same input, even in "
                "evaluation mode: gains hold its noise as well"
            )
            return


def _random_like(delta: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a direction for each example, uniformly, with the length of its perturbation."""
    drawn = torch.randn(delta.shape, generator=generator, dtype=delta.dtype).to(delta.device)
    return drawn * (lengths(delta) / lengths(drawn))


def _joined(parts: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """Put the batches of each layer together."""
    return [
        {measure: torch.cat([one[measure] for one in layer]) for measure in layer[0]}
        for layer in zip(*parts, strict=True)
    ]


def _slopes(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    outputs: Tensor,
    settings: _Settings,
    notes: dict[str, None],
) -> MarginSlopes | None:
    is_logits = outputs.ndim == 2 and len(outputs) == len(x) and outputs.shape[1] > 1
    if y is None and not is_logits:
        notes.setdefault("the model returns no logits (batch, classes): no margin was measured")
        return None
    labels = outputs.argmax(1) if y is None else y

    def logits(z: Tensor) -> Tensor:
        made = first_tensor(model(z))
        return z if made is None else made

    return margin_slope(logits, x, labels, norm=settings.norm, batch_size=settings.batch_size)


# --- summing up -----------------------------------------------------------------------------------


def _layer(found: _Found, i: int) -> LayerGain:
    call, effective = found.calls[i], found.effective.get(i)
    return LayerGain(
        name=call.label,
        kind=type(call.module).__name__,
        adversarial=_quantiles(found.adversarial[i]),
        random=_quantiles(found.random[i]) if found.random else {},
        through="" if effective is None else effective.through,
        singular=None if effective is None else Quantiles.of(effective.singular),
        weight_norm=weight_norm(call.module),
    )


def _quantiles(measures: dict[str, Tensor]) -> dict[str, Quantiles]:
    found = {measure: Quantiles.of(values) for measure, values in measures.items()}
    return {measure: q for measure, q in found.items() if q is not None}


def _known(values: Tensor) -> Quantiles:
    found = Quantiles.of(values)
    assert found is not None
    return found


def _at_logits(slopes: MarginSlopes | None) -> dict[str, Any]:
    if slopes is None:
        return {}
    found: dict[str, Any] = {name: Quantiles.of(v) for name, v in slopes._asdict().items()}
    return {**found, "flat": float((slopes.slope == 0).double().mean())}


def _controlled(result: Amplification, found: _Found, moved: _Found) -> Amplification:
    """Add what a rescale that preserves the function did to each measure."""
    layers = [
        replace(layer, control=_factors(found, moved, i)) for i, layer in enumerate(result.layers)
    ]
    change = (moved.outputs - found.outputs).abs().amax() / found.outputs.abs().amax()
    slopes = (found.slopes, moved.slopes)
    control = Control(
        float(change),
        *(
            None if None in slopes else _factor(*(getattr(s, name) for s in slopes))
            for name in ("slope", "distance")
        ),
    )
    return replace(result, layers=layers, control=control)


def _factors(found: _Found, moved: _Found, i: int) -> dict[str, float]:
    ours, theirs = dict(found.adversarial[i]), dict(moved.adversarial[i])
    for measures, of in ((ours, found), (theirs, moved)):
        norm = weight_norm(of.calls[i].module)
        if norm is not None:
            measures["weight_norm"] = torch.tensor([norm], dtype=torch.float64)
        if i in of.effective:
            measures["singular"] = of.effective[i].singular
    return {m: _factor(v, theirs[m]) for m, v in ours.items() if m in theirs}


def _factor(before: Tensor, after: Tensor) -> float:
    """Return by how much the values changed, in the median; 1 where there are none."""
    ratios = torch.where(before == after, 1.0, after.double() / before.double())
    found = Quantiles.of(ratios)
    return 1.0 if found is None else found.middle
