"""Claim `invariance`: rescaling normalized weights changes nothing but the size of derivatives."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onsphere.norms import ActivationNorm
from onsphere.report.document import Figure, Outcome, Panel, Reference, Series, Table
from onsphere.report.number import number
from onsphere.studies.claims.base import Claim, Details, Outcomes
from onsphere.studies.claims.plan import Plan, Results, average, label, on_trained, worst
from onsphere.studies.claims.statement import Statement
from onsphere.studies.engine.job import Cell, Config, Inputs, Task
from onsphere.studies.engine.job import Outcome as Found
from onsphere.studies.setup.network import Network
from onsphere.studies.setup.statistics import log_slope
from onsphere.studies.setup.training import Training, restore

_IMAGES = 64
_SCALES = tuple(10.0 ** (k / 2) for k in range(-4, 5))  # 1e-2 .. 1e2
_TINY = 1e-30  # stands for eps -> 0
_EXACT = 1e-9  # threshold for every law at eps -> 0, relative, float64
_ABSURD = 1e9  # a law that fails by more than this only clutters the picture
_CONTROL = 0.01  # the change of the function that is asked of the control
_SLOPE = 0.1  # how far the exponent of the eps leak may be from -2


def measure(config: Config, inputs: Inputs) -> Found:
    """Rescale all hidden weights of a trained network by 1e-2..1e2 and measure, in float64."""
    settings = Training(**config["training"])
    x = inputs.images.train_x[:_IMAGES].double()
    y = inputs.images.train_y[:_IMAGES]
    tiny, real = (_model(settings, inputs, eps) for eps in (_TINY, None))
    result: dict[str, Any] = {"exact": _laws(tiny, x, y), "leak": _leak(real, tiny, x)}
    if settings.method == "bn":
        result["eps_identity"] = _eps_identity(real, x, y)
    return Found(result)


@torch.no_grad()
def _leak(real: Network, tiny: Network, x: Tensor) -> list[float]:
    """How far the logits at the real eps are from those at eps → 0, at each scale of the weights.

    The reference has no leak of its own, so that the power law is not bent near a = 1.
    """
    weights = [parameter for parameter, _ in real.hidden_weights().values()]
    start, reference, found = [w.clone() for w in weights], tiny(x), []
    for a in _SCALES:
        _assign(weights, [a * w for w in start])
        found.append(_change(real(x), reference) or 0.0)
    _assign(weights, start)
    return found


def _model(settings: Training, inputs: Inputs, eps: float | None) -> Network:
    model = restore(settings, inputs, eps).double()
    # Batch statistics, as in training; a weight method's power iteration must stand still.
    return model.train(model.has_eps)


def _laws(model: Network, x: Tensor, y: Tensor) -> dict[str, list[float | None]]:
    """Everything the invariance predicts, as relative deviations at each scale."""
    weights = [parameter for parameter, _ in model.hidden_weights().values()]
    start = [w.detach().clone() for w in weights]
    generator = torch.Generator().manual_seed(0)
    probe = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    reference = _derivatives(model, weights, probe, x, y)
    found: dict[str, list[float | None]] = {
        k: [] for k in ("function", "radial", "gradient", "hessian", "euler")
    }
    for a in _SCALES:
        _assign(weights, [a * w for w in start])
        here = _derivatives(model, weights, probe, x, y)
        found["function"].append(_change(here["logits"], reference["logits"]))
        found["radial"].append(float(here["radial"]))
        found["gradient"].append(_change(a * here["gradient"], reference["gradient"]))
        found["hessian"].append(_change(a * a * here["hessian"], reference["hessian"]))
        found["euler"].append(_change(-here["hessian_weight"], here["gradient"]))
    _assign(weights, start)
    return found


def _derivatives(
    model: Network, weights: Sequence[Tensor], probe: Sequence[Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Logits, gradient, radial share, and Hessian times the probe and times the weights."""
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    hessian = torch.autograd.grad(grads, weights, probe, retain_graph=True)
    along = torch.autograd.grad(grads, weights, [w.detach() for w in weights])
    gradient = _flat(grads).detach()
    return {
        "logits": logits.detach(),
        "gradient": gradient,
        "hessian": _flat(hessian),
        "hessian_weight": _flat(along),
        "radial": _worst_radial(model, grads),
    }


def _worst_radial(model: Network, grads: Sequence[Tensor]) -> Tensor:
    """Largest |<w, g>| / (|w| |g|) over all vectors that have a gradient."""
    worst_share = torch.zeros((), dtype=torch.float64)
    for (weight, axes), grad in zip(model.hidden_weights().values(), grads, strict=True):
        w, g = axes.gather(weight.detach()), axes.gather(grad.detach())
        size = w.norm(dim=-1) * g.norm(dim=-1)
        alive = g.norm(dim=-1) > 1e-9 * grad.detach().norm()
        share = ((w * g).sum(-1).abs() / size)[alive]
        if share.numel():
            worst_share = torch.maximum(worst_share, share.max())
    return worst_share


def _eps_identity(model: Network, x: Tensor, y: Tensor) -> float:
    r"""Check the eps residual <w_c, g_c> = eps/(sigma_c^2 + eps) gamma_c dL/dgamma_c, last layer.

    Weights are shrunk tenfold first, so that the residual is far above rounding.
    """
    norm = model.norms[2]
    assert isinstance(norm, ActivationNorm)
    assert norm.weight is not None
    weight = model.hidden_weights()["convs.2.weight"][0]
    start = weight.detach().clone()
    _assign([weight], [start / 10])
    met: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, args: met.append(args[0].detach()))
    loss = F.cross_entropy(model(x), y)
    hook.remove()
    to_weight, to_gain = torch.autograd.grad(loss, [weight, norm.weight])
    variance, eps = met[0].var((0, 2, 3), unbiased=False), norm.eps_for(met[0])
    left = (weight * to_weight).sum((1, 2, 3))
    right = eps / (variance + eps) * norm.weight * to_gain
    _assign([weight], [start])
    return float((left - right).detach().abs().max() / right.detach().abs().max())


@torch.no_grad()
def _assign(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _change(after: Tensor, before: Tensor) -> float | None:
    """Relative change; ``None`` where there is nothing: a loss that saturates has no gradient."""
    change, size = float((after - before).norm()), float(before.norm())
    if size == 0:
        return None if change == 0 else _ABSURD
    return min(change / size, _ABSURD)


MEASURE = Task("invariance.measure", 3, measure)


def _cells(plan: Plan, method: str, seed: int) -> list[Cell]:
    return [on_trained(plan, MEASURE, method, seed, cost=0.4)]


_LAWS = {
    "function": "function",
    "radial": "radial gradient",
    "gradient": "gradient ∝ 1/a",
    "hessian": "Hessian ∝ 1/a²",
    "euler": "H w = −g",
}

_Records = Sequence[Sequence[dict[str, Any]]]


def _laws_of(*laws: str) -> Callable[[_Records], list[float | None]]:
    """Return, for every seed, the largest deviation from some laws over all scales."""

    def values(records: _Records) -> list[float | None]:
        return [worst([_largest(own, law) for law in laws]) for (own,) in records]

    return values


def _largest(own: dict[str, Any], law: str) -> float:
    """Return the largest deviation from a law over the scales at which it can be told."""
    return worst([value for value in own["exact"][law] if value is not None])


def _shrunk_change(records: _Records) -> list[float | None]:
    """Return the change that is asked of the control, over the one that is measured."""
    return [_CONTROL / max(_largest(own, "function"), 1e-300) for (own,) in records]


def _exponent_error(records: _Records) -> list[float | None]:
    """Return how far the exponent of the leak is from -2; far off where there is no leak."""
    slopes = [_leak_slope([own]) for (own,) in records]
    return [_ABSURD if slope is None else abs(slope + 2) for slope in slopes]


def _identity(
    name: str,
    hypothesis: str,
    quantity: str,
    values: Callable[[_Records], list[float | None]],
    margin: float = _EXACT,
    methods: Callable[[Plan], tuple[str, ...]] = lambda plan: plan.normalized,
) -> Statement:
    return Statement(
        name=name,
        hypothesis=hypothesis,
        quantity=quantity,
        margin=margin,
        methods=methods,
        cells=_cells,
        values=values,
        kind="identity",
        basis="proved",
    )


_STATEMENTS = (
    _identity(
        "function",
        "Multiplying the weights before a normalization does not change what the network computes.",
        "largest change of the logits, relative, over scales 0.01 to 100 of all hidden weights at "
        "eps → 0",
        _laws_of("function"),
    ),
    _identity(
        "control",
        "Without a normalization it does.",
        "1 %, over the largest change of the logits of the network without normalization",
        _shrunk_change,
        1.0,
        lambda _: ("none",),
    ),
    _identity(
        "gradient",
        "The gradient is orthogonal to the weights, and twice the norm means half the gradient.",
        "largest radial share of the gradient, and largest deviation of the gradient from 1/a",
        _laws_of("radial", "gradient"),
    ),
    _identity(
        "curvature",
        "The loss is as much sharper as the squared norm is smaller.",
        "largest deviation of the Hessian from 1/a², and of its product with the weights from "
        "minus the gradient",
        _laws_of("hessian", "euler"),
    ),
    _identity(
        "leak",
        "What eps breaks of this grows as the inverse square of the norm.",
        "deviation of the exponent of the change of the logits, in the scale a, from −2",
        _exponent_error,
        _SLOPE,
        # The other methods' eps is so small that rounding hides the leak.
        lambda plan: tuple(m for m in ("bn", "ln", "in", "gn", "rms") if m in plan.normalized),
    ),
    _identity(
        "eps",
        "With its eps, BatchNorm's radial gradient is eps/(σ²+eps)·γ·∂L/∂γ.",
        "largest deviation from it, relative",
        lambda records: [own["eps_identity"] for (own,) in records],
        1e-8,
        lambda _: ("bn",),
    ),
)


def _details(plan: Plan, results: Results) -> Details:
    found = {
        (method, seed): results[_cells(plan, method, seed)[0].key]
        for method in plan.methods
        for seed in plan.exact_seeds
    }
    rows, slopes = [], {}
    for method in plan.methods:
        own = [found[method, seed] for seed in plan.exact_seeds]
        deviations = [worst([_largest(o, law) for o in own]) for law in _LAWS]
        slopes[method] = _leak_slope(own)
        leak = worst([o["leak"][0] for o in own])
        rows.append((label(method), *deviations, leak, slopes[method]))
    measured = {m: s for m, s in slopes.items() if s is not None}
    control = rows[plan.methods.index("none")][1]
    return Details(
        findings=[
            "At the real eps rescaling changes the logits a little (the leak), the more the "
            "smaller the norm: with exponent "
            + ", ".join(f"{label(m)} {number(s, 3)}" for m, s in measured.items())
            + " (predicted −2).",
            "Without normalization the function changes by up to "
            f"{number(float(f'{control:.0e}'))} times its size.",
        ],
        conditions=[
            f"all three hidden weights scaled together, {_IMAGES} training images, float64",
            "train mode (batch statistics) for activation norms; power iteration frozen for SN",
        ],
        figures=[_law_figure(plan, found), _leak_figure(plan, found)],
        tables=[
            Table(
                "Largest relative deviation from each law over scales 1e-2 to 1e2 and seeds",
                (
                    "method",
                    *_LAWS.values(),
                    "function at a = 0.01, real eps",
                    "exponent of the leak",
                ),
                rows,
                "The first five columns at eps → 0. The row none is the control: there the laws "
                "must fail.",
            )
        ],
    )


def _advice(outcomes: Outcomes) -> str:
    if all(outcome == Outcome.HOLDS for outcome in outcomes.values()):
        return (
            "The norm of a normalized weight says nothing about what your network computes; it "
            "only sets the step: twice the norm means a quarter of the effective learning rate."
        )
    return "Not every law of the scale holds here: look below which, before you rescale weights."


def _leak_slope(own: list[dict[str, Any]]) -> float | None:
    """Exponent of the leak in a where it is small and no rounding; ``None`` where there is none.

    The power law is that of small leaks: of instances with little variance (InstanceNorm's) a
    larger leak shows less of it, by saturation. So the three smallest count.
    """
    slopes = []
    for one in own:
        pairs = zip(_SCALES, one["leak"], strict=True)
        points = sorted(((a, leak) for a, leak in pairs if 1e-11 < leak < 1e-2), key=lambda p: p[1])
        if len(points) >= 2:
            slopes.append(log_slope(*zip(*points[:3], strict=True)))
    return average(slopes) if slopes else None


def _law_figure(plan: Plan, found: dict[tuple[str, int], dict[str, Any]]) -> Figure:
    panels = [
        Panel(
            label(method),
            "scale a of the hidden weights",
            "relative deviation",
            [
                Series(
                    text, _SCALES, _floor(found[method, plan.seeds[0]]["exact"][law]), style="both"
                )
                for law, text in _LAWS.items()
            ],
            x_scale="log",
            y_scale="log",
            references=[Reference("horizontal", _EXACT, "threshold")],
            y_limits=(1e-17, 1e3),
        )
        for method in plan.methods
    ]
    return Figure(
        "invariance-laws",
        "Rescaled weights: same function, gradient over a, Hessian over a²",
        "Deviation from each law at eps → 0, first seed. Below the threshold is rounding; the "
        "network without normalization is the control and must fail (a gap: its loss saturates, "
        "and nothing is left to compare).",
        panels,
    )


def _leak_figure(plan: Plan, found: dict[tuple[str, int], dict[str, Any]]) -> Figure:
    series = [
        Series(
            label(method),
            _SCALES,
            _floor(found[method, plan.seeds[0]]["leak"]),
            style="both",
        )
        for method in plan.normalized
    ]
    slope = [1e-6 * a**-2 for a in _SCALES]
    series.append(Series("slope −2", _SCALES, slope, dashed=True, color="predicted"))
    return Figure(
        "invariance-eps",
        "How eps breaks the invariance as the norm shrinks",
        "How far the logits at each method's real eps are from those at eps → 0, relative, when "
        "the hidden weights are scaled by a. Predicted: proportional to eps/(a²σ²). The weight "
        "methods WN (weight normalization), CWN (the same, centred) and SN (spectral "
        "normalization) have "
        "hardly any eps.",
        [
            Panel(
                "",
                "scale a of the hidden weights",
                "distance from eps → 0",
                series,
                x_scale="log",
                y_scale="log",
                y_limits=(1e-17, 10.0),
            )
        ],
        columns=1,
    )


def _floor(values: Sequence[float | None]) -> list[float]:
    """Lift exact zeros onto the logarithmic axis; what cannot be told is a gap."""
    return [math.nan if value is None else max(value, 1e-17) for value in values]


CLAIM = Claim(
    name="invariance",
    title="Normalized weights have no scale",
    statement="Most normalization methods are scaling invariant: multiplying the weights before "
    "them changes nothing, so the scaling symmetry can be removed (Sun et al. 2020).",
    prediction="For weights w with gradient g and Hessian H, and any a > 0: f(aw) = f(w); "
    "<w, ∇f> = 0; ∇f(aw) = ∇f(w)/a; ∇²f(aw) = ∇²f(w)/a²; H w = −g. All of it is exact at eps = 0. "
    "At the real eps the function changes by an amount proportional to "
    "eps/(a²σ²), and BatchNorm's radial gradient is eps/(σ²+eps)·γ·∂L/∂γ.",
    statements=_STATEMENTS,
    advice=_advice,
    details=_details,
    own_spheres=True,
)
