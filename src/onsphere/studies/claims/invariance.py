"""Claim `invariance`: rescaling normalized weights changes nothing but the size of derivatives."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onsphere.norms import ActivationNorm
from onsphere.report.document import Figure, Panel, Reference, Series, Table, Verdict
from onsphere.report.number import number
from onsphere.studies.claims.base import (
    Claim,
    Judgement,
    Plan,
    Results,
    average,
    label,
    on_trained,
    worst,
)
from onsphere.studies.engine.job import Cell, Config, Inputs, Outcome, Task
from onsphere.studies.setup.network import Network
from onsphere.studies.setup.statistics import log_slope
from onsphere.studies.setup.training import Training, restore

_IMAGES = 64
_SCALES = tuple(10.0 ** (k / 2) for k in range(-4, 5))  # 1e-2 .. 1e2
_TINY = 1e-30  # stands for eps -> 0
_EXACT = 1e-9  # threshold for every law at eps -> 0, relative, float64
_ABSURD = 1e9  # a law that fails by more than this only clutters the picture
_SLOPE = 0.1  # how far the exponent of the eps leak may be from -2


def measure(config: Config, inputs: Inputs) -> Outcome:
    """Rescale all hidden weights of a trained network by 1e-2..1e2 and measure, in float64."""
    settings = Training(**config["training"])
    x = inputs.images.train_x[:_IMAGES].double()
    y = inputs.images.train_y[:_IMAGES]
    tiny, real = (_model(settings, inputs, eps) for eps in (_TINY, None))
    result: dict[str, Any] = {
        "exact": _laws(tiny, x, y),
        "real": _laws(real, x, y),
    }
    if settings.method == "bn":
        result["eps_identity"] = _eps_identity(real, x, y)
    return Outcome(result)


def _model(settings: Training, inputs: Inputs, eps: float | None) -> Network:
    model = restore(settings, inputs, eps).double()
    # Batch statistics, as in training; a weight method's power iteration must stand still.
    return model.train(model.has_eps)


def _laws(model: Network, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Everything the invariance predicts, as relative deviations at each scale."""
    weights = [parameter for parameter, _ in model.hidden_weights().values()]
    start = [w.detach().clone() for w in weights]
    generator = torch.Generator().manual_seed(0)
    probe = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    reference = _derivatives(model, weights, probe, x, y)
    found: dict[str, list[float]] = {
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


def _change(after: Tensor, before: Tensor) -> float:
    change, size = float((after - before).norm()), float(before.norm())
    if size == 0:  # the control saturates when scaled up: nothing is left to compare
        return 0.0 if change == 0 else _ABSURD
    return min(change / size, _ABSURD)


MEASURE = Task("invariance.measure", 2, measure)


def _cells(plan: Plan) -> dict[tuple[str, int], Cell]:
    return on_trained(plan, MEASURE, plan.methods, cost=0.4)


_LAWS = {
    "function": "function",
    "radial": "radial gradient",
    "gradient": "gradient ∝ 1/a",
    "hessian": "Hessian ∝ 1/a²",
    "euler": "H w = −g",
}


def _judge(plan: Plan, results: Results) -> Judgement:
    found = {key: results[cell.key] for key, cell in _cells(plan).items()}
    rows, slopes = [], {}
    deviation: dict[str, list[float]] = {}
    for method in plan.methods:
        own = [found[method, seed] for seed in plan.seeds]
        deviations = [worst([worst(o["exact"][law]) for o in own]) for law in _LAWS]
        deviation[method] = deviations
        slopes[method] = _leak_slope(own)
        leak = worst([o["real"]["function"][0] for o in own])
        rows.append((label(method), *deviations, leak, slopes[method]))
    control = deviation["none"][0]
    largest = worst([worst(deviation[m]) for m in plan.normalized])
    identity = worst([found["bn", seed]["eps_identity"] for seed in plan.seeds])
    measured = {m: s for m, s in slopes.items() if s is not None}
    power_law = bool(measured) and all(abs(slope + 2) <= _SLOPE for slope in measured.values())
    exact = largest <= _EXACT and control > 1e-2
    verdict = Verdict.HOLDS if exact and power_law and identity < 1e-8 else Verdict.FAILS
    return Judgement(
        verdict,
        f"largest deviation from any of the five laws {number(largest, 3)} at eps → 0; without "
        f"normalization the function changes by a factor of {number(float(f'{control:.0e}'))}",
        findings=[
            f"Over a scale of 1e-2 to 1e2 all five laws hold to {number(largest, 3)} for all "
            f"{len(plan.normalized)} methods at eps → 0.",
            "At the real eps the leak grows as the norm shrinks, with exponent "
            + ", ".join(f"{label(m)} {number(s, 3)}" for m, s in measured.items())
            + " (predicted −2).",
            "BatchNorm's radial gradient at its real eps is eps/(σ²+eps)·γ·∂L/∂γ to "
            f"{number(identity, 3)}.",
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


def _leak_slope(own: list[dict[str, Any]]) -> float | None:
    """Exponent of the function's change in a, where the change is smallest and no rounding.

    The power law is that of small leaks: of instances with little variance (InstanceNorm's) a
    larger scale shows less of it, by saturation. So the two smallest leaks count.
    """
    slopes = []
    for one in own:
        points = [
            (a, change)
            for a, change in zip(_SCALES, one["real"]["function"], strict=True)
            if a < 0.5 and 1e-8 < change < 1e-2
        ]
        # The reference has a leak of its own (a = 1), so the excess goes as 1/a^2 - 1.
        if len(points) >= 2:
            smallest = sorted(points, key=lambda point: point[1])[:2]
            corrected = [change / (1 - a * a) for a, change in smallest]
            slopes.append(log_slope([a for a, _ in smallest], corrected))
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
        "network without normalization is the control and must fail.",
        panels,
    )


def _leak_figure(plan: Plan, found: dict[tuple[str, int], dict[str, Any]]) -> Figure:
    series = [
        Series(
            label(method),
            _SCALES,
            _floor(found[method, plan.seeds[0]]["real"]["function"]),
            style="both",
        )
        for method in plan.normalized
    ]
    slope = [1e-6 * a**-2 for a in _SCALES]
    series.append(Series("slope −2", _SCALES, slope, dashed=True, color="predicted"))
    return Figure(
        "invariance-eps",
        "How eps breaks the invariance as the norm shrinks",
        "Relative change of the logits when the hidden weights are scaled by a, at each method's "
        "real eps. Predicted: proportional to eps/(a²σ²).",
        [
            Panel(
                "",
                "scale a of the hidden weights",
                "change of the logits",
                series,
                x_scale="log",
                y_scale="log",
                y_limits=(1e-17, 10.0),
            )
        ],
        columns=1,
    )


def _floor(values: Sequence[float]) -> list[float]:
    """Lift exact zeros onto the logarithmic axis."""
    return [max(value, 1e-17) for value in values]


CLAIM = Claim(
    name="invariance",
    title="Normalized weights have no scale",
    statement="Most normalization methods are scaling invariant: multiplying the weights before "
    "them changes nothing, so the scaling symmetry can be removed (Sun et al. 2020).",
    prediction="f(aw) = f(w); <w, ∇f> = 0; ∇f(aw) = ∇f(w)/a; ∇²f(aw) = ∇²f(w)/a²; H w = −g, all "
    "exactly at eps = 0. At the real eps the function changes by an amount proportional to "
    "eps/(a²σ²), and BatchNorm's radial gradient is eps/(σ²+eps)·γ·∂L/∂γ.",
    threshold=f"Holds if at eps → 0 every law's relative deviation is at most {_EXACT:.0e} for "
    "every method while the network without normalization changes by more than 1 %, the leak's "
    f"exponent is −2 ± {_SLOPE} and the eps identity holds to 1e-8.",
    cells=lambda plan: list(_cells(plan).values()),
    judge=_judge,
    own_spheres=True,
)
