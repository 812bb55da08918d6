"""Open question `gain`: do learned gain and shift track the pre-activations' spread and mean?"""

import torch
from torch import Tensor

from onsphere.norms import ActivationNorm
from onsphere.report.document import Figure, Panel, Reference, Series, Table, Verdict
from onsphere.studies.claims.base import (
    Claim,
    Judgement,
    Plan,
    Results,
    average,
    label,
    on_trained,
)
from onsphere.studies.engine.job import Cell, Config, Inputs, Outcome, Task
from onsphere.studies.setup.network import GROUPS, Network
from onsphere.studies.setup.statistics import estimate, rank_correlation
from onsphere.studies.setup.training import Training, restore

_TRACKS = 0.5  # rank correlation from which on we speak of tracking
_IMAGES = 512
_GAUGES = 20  # random rescales that keep the function


def measure(config: Config, inputs: Inputs) -> Outcome:
    """Correlate gain with spread and shift with mean, layer by layer, and under random gauges.

    Multiplying one filter before BatchNorm keeps the function and the gain, but multiplies the
    spread of its pre-activation; a relation between them that is a property of the *function* must
    survive it.
    """
    settings = Training(**config["training"])
    model = restore(settings, inputs)
    layers = [
        _layer(gain, shift, z, _rescales(model, z.shape[1], settings.seed))
        for gain, shift, z in _pairs(model, inputs.images.train_x[:_IMAGES])
    ]
    return Outcome({"layers": layers})


def _pairs(model: Network, x: Tensor) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Return gain, shift and pre-activation ``(images, ...)`` of each normalized layer."""
    met: list[Tensor] = []
    hooks = [
        conv.register_forward_hook(lambda _module, _args, output: met.append(output.detach()))
        for conv in model.convs
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    pairs: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for conv, norm, z in zip(model.convs, model.norms, met, strict=True):
        if isinstance(norm, ActivationNorm):
            assert norm.weight is not None
            shift = None if norm.bias is None else norm.bias.detach()
            pairs.append((norm.weight.detach(), shift, z))
        else:
            own = dict(conv.named_parameters())
            gain, bias = own["parametrizations.weight.original0"].detach(), own["bias"].detach()
            pairs.append((gain.flatten(), bias, z - bias[:, None, None]))
    return pairs


def _rescales(model: Network, channels: int, seed: int) -> Tensor:
    """Random factors of the spread of each channel that keep the function: shape (draws, channels).

    One factor per filter, group or layer, whatever the method is invariant to; all 1 for weight
    methods, whose pre-activations do not feel the scale of the direction.
    """
    assert model.method is not None
    if model.method.normalizes == "weight":
        return torch.ones(1, channels)
    units = {"filter": channels, "group": GROUPS, "layer": 1}[model.method.scale_unit]
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(_GAUGES, units, generator=generator).exp()
    return factors.repeat_interleave(channels // units, 1)


def _layer(gain: Tensor, shift: Tensor | None, z: Tensor, rescales: Tensor) -> dict[str, object]:
    over = (0, 2, 3) if gain.ndim == 1 else (0,)
    spread, mean = z.std(over), z.mean(over).flatten()
    per_channel = (-1, *([1] * (spread.ndim - 1)))
    under_gauge = [
        _rank(gain.abs().flatten(), (spread * factors.reshape(per_channel)).flatten())
        for factors in rescales
    ]
    size, spread = gain.abs().flatten(), spread.flatten()
    keep = torch.linspace(0, len(size) - 1, min(60, len(size))).round().long()
    return {
        "gain_spread": _rank(size, spread),
        "shift_mean": None if shift is None else _rank(shift.flatten(), mean),
        "gain_spread_gauge": average(under_gauge),
        "ratio": float((size / spread.clamp_min(1e-12)).median()),
        "gain": [float(v) for v in size[keep]],
        "spread": [float(v) for v in spread[keep]],
    }


def _rank(x: Tensor, y: Tensor) -> float:
    return rank_correlation([float(v) for v in x], [float(v) for v in y])


MEASURE = Task("gain.measure", 1, measure)


def _learned(plan: Plan) -> list[str]:
    """Methods with a learned gain."""
    return [m for m in plan.methods if m not in ("none", "sn")]


def _cells(plan: Plan) -> dict[tuple[str, int], Cell]:
    return on_trained(plan, MEASURE, _learned(plan), cost=0.05)


def _judge(plan: Plan, results: Results) -> Judgement:
    found = {key: results[cell.key]["layers"] for key, cell in _cells(plan).items()}
    rows, tracking, shifting = [], [], []
    for method in _learned(plan):
        own = [found[method, seed] for seed in plan.seeds]

        def per_seed(what: str, own: list[list[dict[str, float | None]]] = own) -> list[float]:
            values = [[one[what] for one in layers] for layers in own]
            return [average(v) for v in ([x for x in vs if x is not None] for vs in values) if v]

        gain, gauge = estimate(per_seed("gain_spread")), estimate(per_seed("gain_spread_gauge"))
        shifts = per_seed("shift_mean")
        shift = estimate(shifts) if shifts else None
        if gain.mean >= _TRACKS and gain.low > 0:
            tracking.append(label(method))
        if shift is not None and abs(shift.mean) >= _TRACKS and shift.low * shift.high > 0:
            shifting.append(label(method))
        rows.append(
            (
                label(method),
                str(gain),
                str(gauge),
                str(shift) if shift else None,
                estimate(per_seed("ratio")).mean,
            )
        )
    many = len(_learned(plan))
    verdict = Verdict.FAILS
    if len(plan.seeds) == 1:
        verdict = Verdict.OPEN
    elif 3 * len(tracking) >= 2 * many:
        verdict = Verdict.HOLDS
    elif tracking:
        verdict = Verdict.CONDITIONAL
    return Judgement(
        verdict,
        f"gain tracks spread (rank correlation ≥ {_TRACKS}) in {len(tracking)} of {many} methods",
        findings=[
            f"Gain against spread: tracked by {', '.join(tracking) or 'no method'}.",
            f"Shift against mean: tracked by {', '.join(shifting) or 'no method'}.",
            "For BatchNorm, InstanceNorm and (by groups) GroupNorm the spread is a matter of "
            "bookkeeping: rescaling a filter changes it and neither gain nor function. What is "
            "left of the correlation under such rescales stands in the third column.",
        ],
        conditions=[
            f"plain training with a cosine schedule; spread and mean over {_IMAGES} training "
            "images; Spearman's rank correlation over channels (elements for LN and RMS), averaged "
            "over layers, 95 % interval over seeds",
        ],
        figures=[_figure(plan, found)],
        tables=[
            Table(
                "Rank correlations, mean over layers [95 % over seeds]",
                (
                    "method",
                    "gain and spread",
                    "the same under random rescales",
                    "shift and mean",
                    "median gain / spread",
                ),
                rows,
                "Under random rescales: each filter (BN, IN), group (GN) or layer (LN, RMS) times "
                "exp(normal), which keeps the function; weight norms have nothing to rescale.",
            )
        ],
    )


def _figure(plan: Plan, found: dict[tuple[str, int], list[dict[str, list[float]]]]) -> Figure:
    panels = [
        Panel(
            label(method),
            "spread of the pre-activation",
            "learned gain",
            [
                Series(f"layer {i + 1}", layer["spread"], layer["gain"], style="points")
                for i, layer in enumerate(found[method, plan.seeds[0]])
            ],
            references=[Reference("diagonal", label="gain = spread")],
        )
        for method in _learned(plan)
    ]
    return Figure(
        "gain-spread",
        "Learned gain against the spread of the pre-activation",
        "One point per channel (element, for LN and RMS), first seed. Were gains learned to "
        "restore the spread, points would lie on the diagonal.",
        panels,
    )


CLAIM = Claim(
    name="gain",
    title="Gain and shift restore the pre-activations' spread and mean",
    statement="Open question studied in the paper: do the learned gain and shift approximate the "
    "spread and mean of the pre-activations?",
    prediction="None for activation norms: the spread depends on the scale of the weights, which "
    "the function does not. For weight norms the gain is the length of the effective weight, so "
    "gain and spread should go together.",
    threshold=f"Holds if the rank correlation of gain and spread is at least {_TRACKS} with a "
    "95 % interval over seeds above 0 in two thirds of the methods; under conditions if in some; "
    "does not hold if in none. One seed decides nothing.",
    cells=lambda plan: list(_cells(plan).values()),
    judge=_judge,
    own_spheres=True,
)
