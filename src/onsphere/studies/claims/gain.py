"""Open question `gain`: do learned gain and shift approach the pre-activations' spread and mean?

The paper asks it over training: of one run at a constant rate, snapshots are looked at.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onsphere.norms import ActivationNorm
from onsphere.report.document import Figure, Outcome, Panel, Reference, Series, Table
from onsphere.studies.claims.base import Claim, Details, Outcomes
from onsphere.studies.claims.plan import Plan, Results, average, label, on_recorded
from onsphere.studies.claims.statement import Statement, Values
from onsphere.studies.engine.job import Cell, Config, Inputs, Task
from onsphere.studies.engine.job import Outcome as Found
from onsphere.studies.setup.network import GROUPS, Network
from onsphere.studies.setup.statistics import fisher_z, rank_correlation
from onsphere.studies.setup.training import Training, restore, restore_snapshots
from onsphere.studies.setup.training_group import member

_TRACKS = 0.5  # a smaller rank correlation is called none
_CLOSER = math.log(1.1)  # a smaller approach is called none
_IMAGES = 512
_GAUGES = 20  # random rescales that keep the function


def measure(config: Config, inputs: Inputs) -> Found:
    """Compare gain with spread and shift with mean, layer by layer, at every snapshot of a run.

    At the end also under random rescales: multiplying one filter before BatchNorm keeps the
    function and the gain, but multiplies the spread of its pre-activation; a relation between them
    that is a property of the *function* must survive it.
    """
    settings, own = Training(**config["training"]), member(inputs, config["member"])
    if own.records[0]["diverged"]:
        return Found({"diverged": True})
    snapshots, layers = [], []
    for model in restore_snapshots(settings, own):
        pairs = pairs_of(model, inputs.images.train_x[:_IMAGES])
        snapshots.append([_distances(*pair) for pair in pairs])
        layers = [
            _layer(*pair, _rescales(model, pair[2].shape[1], settings.seed)) for pair in pairs
        ]
    return Found({"diverged": False, "snapshots": snapshots, "layers": layers})


def pairs_of(model: Network, x: Tensor) -> list[tuple[Tensor, Tensor | None, Tensor]]:
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


def _moments(gain: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Spread and mean of the pre-activation of every channel, or element where gains are such."""
    over = (0, 2, 3) if gain.ndim == 1 else (0,)
    return z.std(over), z.mean(over)


def _distances(gain: Tensor, shift: Tensor | None, z: Tensor) -> dict[str, Any]:
    """How far gain is from spread (in logs) and shift from mean (in spreads), and both."""
    spread, mean = (
        value.flatten().clamp_min(1e-12) if i == 0 else value.flatten()
        for i, value in enumerate(_moments(gain, z))
    )
    size = gain.abs().flatten().clamp_min(1e-12)
    shifts = None if shift is None else shift.flatten()
    return {
        "gain_distance": float((size / spread).log().abs().mean()),
        "shift_distance": None
        if shifts is None
        else float(((shifts - mean) / spread).abs().mean()),
        "gain": [float(v) for v in gain.flatten()],
        "shift": None if shifts is None else [float(v) for v in shifts],
    }


def _layer(gain: Tensor, shift: Tensor | None, z: Tensor, rescales: Tensor) -> dict[str, Any]:
    spread, mean = _moments(gain, z)
    per_channel = (-1, *([1] * (spread.ndim - 1)))
    under_gauge = [
        _rank(gain.abs().flatten(), (spread * factors.reshape(per_channel)).flatten())
        for factors in rescales
    ]
    size, spread = gain.abs().flatten(), spread.flatten()
    keep = torch.linspace(0, len(size) - 1, min(60, len(size))).round().long()
    return {
        "gain_spread": _rank(size, spread),
        "shift_mean": None if shift is None else _rank(shift.flatten(), mean.flatten()),
        "gain_spread_gauge": average(under_gauge),
        "ratio": float((size / spread.clamp_min(1e-12)).median()),
        "gain": [float(v) for v in size[keep]],
        "spread": [float(v) for v in spread[keep]],
    }


def _rank(x: Tensor, y: Tensor) -> float:
    return rank_correlation([float(v) for v in x], [float(v) for v in y])


@torch.no_grad()
def check_length(config: Config, inputs: Inputs) -> Found:
    """Hold the gain of a weight normalization against the length of the effective weight."""
    model = restore(Training(**config["training"]), inputs)
    errors = []
    for conv in model.convs:
        gain = dict(conv.named_parameters())["parametrizations.weight.original0"].flatten()
        lengths = conv.weight.flatten(1).norm(dim=1)  # type: ignore[operator]
        errors.append(float(((lengths - gain.abs()) / gain.abs()).abs().max()))
    return Found({"error": max(errors)})


MEASURE = Task("gain.measure", 2, measure)
LENGTH = Task("gain.length", 1, check_length)


def _learned(plan: Plan) -> list[str]:
    """Methods with a learned gain."""
    return [m for m in plan.methods if m not in ("none", "sn")]


def _activation(plan: Plan) -> list[str]:
    """Methods with a gain and a shift that normalize activations by channel or element."""
    return [m for m in _learned(plan) if m not in ("wn", "cwn")]


def _shifted(plan: Plan) -> list[str]:
    return [m for m in _activation(plan) if m != "rms"]


def _cells(plan: Plan, method: str, seed: int) -> list[Cell]:
    return [on_recorded(plan, MEASURE, method, seed, cost=0.1)]


def _length_cells(plan: Plan, method: str, seed: int) -> list[Cell]:
    trained = plan.trained(method, seed).cell()
    return [Cell(LENGTH, {"training": trained.config}, (trained,), cost=0.01)]


_Records = Sequence[Sequence[dict[str, Any]]]


def _over_seeds(value: Callable[[dict[str, Any]], float]) -> Callable[[_Records], Values]:
    return lambda records: [None if own["diverged"] else value(own) for (own,) in records]


def _approach(what: str) -> Callable[[dict[str, Any]], float]:
    """Return the logarithm of the distance at a tenth of the run over that at its end."""

    def value(own: dict[str, Any]) -> float:
        first, last = (
            average([layer[what] for layer in own["snapshots"][place]]) for place in (0, -1)
        )
        return math.log(max(first, 1e-12) / max(last, 1e-12))

    return value


def _slowing(own: dict[str, Any]) -> float:
    """Return the logarithm of how much slower gains move in the last two thirds than before."""
    sides = []
    for before, after, part in ((0, 1, 1 / 3 - 1 / 10), (1, 2, 2 / 3)):
        moved = [
            math.dist(a["gain"], b["gain"]) / math.sqrt(len(a["gain"]))
            for a, b in zip(own["snapshots"][before], own["snapshots"][after], strict=True)
        ]
        sides.append(max(average(moved), 1e-12) / part)
    return math.log(sides[0] / sides[1])


def _correlation(own: dict[str, Any]) -> float:
    """Return the rank correlation of gain and spread at the end: mean of Fisher's z over layers."""
    return average([fisher_z(layer["gain_spread"]) for layer in own["layers"]])


_STATEMENTS = (
    Statement(
        name="gain-approaches",
        hypothesis="In training, the gain of an activation norm approaches the spread of the "
        "pre-activation.",
        quantity="distance of gain from spread (mean absolute logarithm of their ratio) at a tenth "
        "of the run over that at its end",
        margin=_CLOSER,
        methods=_activation,
        cells=_cells,
        values=_over_seeds(_approach("gain_distance")),
        axis="ratio",
        few=True,
    ),
    Statement(
        name="shift-approaches",
        hypothesis="In training, the shift of an activation norm approaches the mean of the "
        "pre-activation.",
        quantity="distance of shift from mean (in units of the spread) at a tenth of the run over "
        "that at its end",
        margin=_CLOSER,
        methods=_shifted,
        cells=_cells,
        values=_over_seeds(_approach("shift_distance")),
        axis="ratio",
        few=True,
    ),
    Statement(
        name="gain-stabilizes",
        hypothesis="The gain of an activation norm comes to rest.",
        quantity="speed of the gains between a tenth and a third of the run over that in the rest",
        margin=math.log(1.5),
        methods=_activation,
        cells=_cells,
        values=_over_seeds(_slowing),
        axis="ratio",
        few=True,
    ),
    Statement(
        name="gain-tracks-spread",
        hypothesis="At the end, channels with a larger spread have a larger gain (activation "
        "norms).",
        quantity="Spearman's rank correlation over channels (elements for LN and RMS), on Fisher's "
        "scale, mean over layers",
        margin=fisher_z(_TRACKS),
        methods=_activation,
        cells=_cells,
        values=_over_seeds(_correlation),
        axis="correlation",
        few=True,
    ),
    Statement(
        name="gain-is-length",
        hypothesis="The gain of a weight normalization is the length of the effective weight, so "
        "it tracks the spread by construction.",
        quantity="largest deviation of a filter's length from its gain, relative, in float32",
        margin=1e-5,
        methods=lambda plan: [m for m in plan.methods if m in ("wn", "cwn")],
        cells=_length_cells,
        values=lambda records: [own["error"] for (own,) in records],
        kind="identity",
        basis="proved",
    ),
)


def _details(plan: Plan, results: Results) -> Details:
    found = {
        (method, seed): own["layers"]
        for method in _activation(plan)
        for seed in plan.first_seeds
        if not (own := results[_cells(plan, method, seed)[0].key])["diverged"]
    }
    rows = []
    for method in _activation(plan):
        layers = [layer for (m, _), own in found.items() if m == method for layer in own]

        def mean(what: str, layers: list[dict[str, Any]] = layers) -> float | None:
            values = [layer[what] for layer in layers if layer[what] is not None]
            return average(values) if values else None

        rows.append(
            (
                label(method),
                mean("gain_spread"),
                mean("gain_spread_gauge"),
                mean("shift_mean"),
                mean("ratio"),
            )
        )
    return Details(
        findings=[
            "Under BatchNorm, InstanceNorm and (by groups) GroupNorm, rescaling a filter changes "
            "the spread, but neither the gain nor the function. The second column of the table "
            "says what is left of the correlation after such rescales.",
        ],
        conditions=[
            f"plain training at a constant rate, looked at after a tenth, a third and all of "
            f"{plan.scale.steps} steps; spread and mean over {_IMAGES} training images",
        ],
        figures=[_figure(plan, found)],
        tables=[
            Table(
                "Rank correlations, means over layers and the first seeds",
                (
                    "method",
                    "gain and spread",
                    "the same under random rescales",
                    "shift and mean",
                    "median gain / spread",
                ),
                rows,
                "Under random rescales: each filter (BN, IN), group (GN) or layer (LN, RMS) times "
                "exp(normal), which keeps the function.",
            )
        ],
    )


def _figure(plan: Plan, found: dict[tuple[str, int], list[dict[str, Any]]]) -> Figure:
    panels = [
        Panel(
            label(method),
            "spread of the pre-activation",
            "learned gain",
            [
                Series(f"layer {i + 1}", layer["spread"], layer["gain"], style="points")
                for i, layer in enumerate(found.get((method, plan.seeds[0]), []))
            ],
            references=[Reference("diagonal", label="gain = spread")],
        )
        for method in _activation(plan)
    ]
    return Figure(
        "gain-spread",
        "Learned gain against the spread of the pre-activation",
        "One point per channel (element, for LN and RMS), first seed. Were gains learned to "
        "restore the spread, points would lie on the diagonal.",
        panels,
    )


def _advice(outcomes: Outcomes) -> str:
    approaches = {outcomes["gain-approaches"], outcomes["shift-approaches"]}
    if Outcome.HOLDS in approaches and len(approaches) == 1:
        return (
            "Where it is decided, gain and shift move towards spread and mean as you train, but "
            "not far. This depends on the method: do not count on it."
        )
    if approaches <= {Outcome.REVERSED, Outcome.ABSENT, Outcome.MIXED}:
        return (
            "Do not read gain and shift as what the normalization took away: the spread depends on "
            "the scale of the weights, which your network does not feel."
        )
    return "Whether gain and shift bring spread and mean back is open: do not build on it."


CLAIM = Claim(
    name="gain",
    title="Gain and shift restore the pre-activations' spread and mean",
    statement="As an open question: do the learned gain and shift approximate the spread and mean "
    "of the pre-activations?",
    prediction="Nothing for activation norms: the spread depends on the scale of the weights, and "
    "the function does not. For weight norms the gain is the length of the effective weight, so "
    "gain and spread go together by construction.",
    statements=_STATEMENTS,
    advice=_advice,
    details=_details,
    own_spheres=True,
)
