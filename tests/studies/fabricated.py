"""Records that nobody measured, as they would be if every statement held, to try the rules on."""

from collections.abc import Callable, Mapping
from typing import Any

from onsphere.report import Outcome
from onsphere.studies.claims.plan import Plan, Results
from onsphere.studies.claims.statement import decide, outcome_of
from onsphere.studies.study import CLAIMS

PLAN = Plan("digits", (0, 1, 2, 3))
ONE_SEED = Plan("digits", (0,))
SCALES = [10.0 ** (k / 2) for k in range(-4, 5)]
LAWS = ("function", "radial", "gradient", "hessian", "euler")
IMAGES = 100

Record = dict[str, Any]
Change = Callable[[str, Record, Mapping[str, Any]], None]
"""Alters a record in place, given the name of its task and the settings of its (first) training."""


def _sphere(_: Any) -> Record:
    curve = {"measured": [1.0, 1.0], "predicted": [1.0, 1.0], "position": [1.0, 2.0]}
    layer = {"layer": 1, "vectors": 2, "entries": 2, "raw_lengths": [0.5, 3.0]}
    layer |= {"lengths": [1.0, 1.0], "radius_error": 1e-15, "eps_error": 1e-15}
    return {"layers": [{**layer, "eps_shrink": 1e-6, "spectrum_error": 1e-12, "curve": curve}]}


def _invariance(config: Any) -> Record:
    method = config["training"]["method"]
    size = 10.0 if method == "none" else 1e-13
    laws = {law: [size] * len(SCALES) for law in LAWS}
    found: Record = {"exact": laws, "leak": [1e-7 * a**-2 for a in SCALES]}
    return found | ({"eps_identity": 1e-12} if method == "bn" else {})


def _laws(config: Any) -> Record:
    layer: Record = {"step": [1, 2], "norm": [1.0, 1.5], "rotation": [0.1, 0.1]}
    layer |= {"grew": 1.5, "late_growth": 1.0, "late_rotation": 0.1, "free_norm": [1.0, 1.5]}
    if config["training"]["weight_decay"] == 0:
        layer |= {"exponent": 0.25, "free_ratio": 1.0, "spheres_grew": 1.0}
    else:
        layer |= {"predicted_rotation": 0.1, "rotation_ratio": 1.0}
    return {"layers": [dict(layer) for _ in range(3)]}


def _trained(config: Any) -> Record:
    """A group: what plain networks lose, those on the sphere keep; plain losses have spikes."""
    trained = []
    for one in config["trainings"]:
        plain = one["space"] == "plain"
        bad = plain and (one["start_scale"] != 1 or one["weight_decay"] != 0)
        losses = [[i, 3.0 if plain and i % 15 == 14 else 1.0] for i in range(60)]
        found = {"test_accuracy": 0.5 if bad else 0.95, "train_loss": 0.1, "diverged": False}
        trained.append({**found, "loss_curve": losses, "steps_done": 60})
    return {"trained": trained}


def _edges(config: Any) -> Record:
    rates, seed = config["rates"], config["plain"]["seed"]
    accuracy = {"plain": [0.9] * len(rates), "sphere": [0.95] * len(rates)}
    loss = {"plain": [10.0 ** (seed % 2)] * len(rates), "sphere": [0.1] * len(rates)}
    return {"rates": rates, "accuracy": accuracy, "loss": loss, "edge": {"plain": 1, "sphere": 10}}


def rows(robust: int) -> list[int]:
    """So many of a hundred images withstand the attack."""
    return [1] * robust + [0] * (IMAGES - robust)


def _robust(one: Mapping[str, Any]) -> int:
    """Grown norms, decay and the head all matter as the hypotheses say."""
    if one["space"] == "plain":
        return 40 + (10 if one["weight_decay"] else 0)
    gain = 10 if one["head"] == "sphere" else 0
    lost = {1.0: 0, 2.0: 5, 4.0: 10, 8.0: 15}
    return 50 + gain - lost[max(one["norm_growth"], one["rate_growth"])]


def _attack(config: Any) -> Record:
    return {
        "networks": [
            {
                "clean_all": 0.95,
                "right": rows(90),
                "stands": rows(_robust(one)),
                "norm_growth": 2.0,
                "head_growth": 3.0,
            }
            for one in config["trainings"]
        ]
    }


def _control(config: Any) -> Record:
    """The norm as such matters, and statistics do, so that their absence has to be shown."""
    controls = {"rescaled": rows(30), "loud": rows(40), "without eps": rows(40)}
    found = {"right": rows(90), "controls": controls | {"fresh statistics": rows(50)}}
    return found | {
        "cross_entropy": rows(50),
        "cross_entropy_loud": rows(80),
        "curve": [0.8, 0.6, 0.4, 0.2],
    }


def _amplification(_: Any) -> Record:
    sizes = (1.0, 1.5, 2.0)
    return {
        "diverged": False,
        "snapshots": [{"norm": [s] * 3, "raw": [3 * s] * 3, "behind": [s] * 3} for s in sizes],
    }


def _gain(config: Any) -> Record:
    shift = None if config["training"]["method"] == "rms" else 0.1
    snapshots = []
    for gains, distance in (([1.0, 2.0], 1.0), ([3.0, 4.0], 0.8), ([3.1, 4.1], 0.5)):
        layer = {
            "gain_distance": distance,
            "shift_distance": distance,
            "gain": gains,
            "shift": gains,
        }
        snapshots.append([dict(layer) for _ in range(3)])
    layer = {"gain_spread": 0.8, "shift_mean": shift, "gain_spread_gauge": 0.1, "ratio": 1.0}
    layers = [{**layer, "gain": [1.0, 2.0], "spread": [1.0, 2.0]} for _ in range(3)]
    return {"diverged": False, "snapshots": snapshots, "layers": layers}


_HOLDING: dict[str, Callable[[Any], Record]] = {
    "sphere.measure": _sphere,
    "invariance.measure": _invariance,
    "growth.recursion": lambda _: {"error": 1e-14, "shrinking": 0.0},
    "growth.laws": _laws,
    "stability.start": _trained,
    "stability.edge": _edges,
    "stability.part": _trained,
    "robustness.attack": _attack,
    "robustness.control": _control,
    "robustness.amplification": _amplification,
    "gain.measure": _gain,
    "gain.length": lambda _: {"error": 1e-7},
}


def training_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a cell's first training."""
    for key in ("training", "plain"):
        if key in config:
            return config[key]
    return config["trainings"][0]


def records(claim: str, change: Change = lambda *_: None, plan: Plan = PLAN) -> Results:
    """Return a record for every cell of a claim under which all holds, each passed to a change."""
    found = {}
    for cell in CLAIMS[claim].cells(plan):
        found[cell.key] = _HOLDING[cell.task.name](cell.config)
        change(cell.task.name, found[cell.key], training_of(cell.config))
    return found


def outcomes(claim: str, change: Change = lambda *_: None, plan: Plan = PLAN) -> dict[str, Outcome]:
    """Return the outcome of every statement of a claim."""
    statements = CLAIMS[claim].statements
    decisions = decide(statements, plan, records(claim, change, plan))
    return {
        one.name: outcome_of([decisions[one.name, method] for method in one.methods(plan)])
        for one in statements
    }
