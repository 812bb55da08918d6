"""Records that nobody measured, as they would be if each claim held, for judges to be tried on."""

from collections.abc import Callable
from typing import Any

from onsphere.studies.claims.base import Plan, Results
from onsphere.studies.study import CLAIMS

PLAN = Plan("digits", (0, 1, 2), "quick")
ONE_SEED = Plan("digits", (0,), "quick")
SCALES = [10.0 ** (k / 2) for k in range(-4, 5)]
LAWS = ("function", "radial", "gradient", "hessian", "euler")

Change = Callable[[dict[str, Any], dict[str, Any]], None]
"""Alters a record in place, given the configuration of its (training) cell."""


def _sphere(training: dict[str, Any]) -> dict[str, Any]:
    curve = {"measured": [1.0, 1.0], "predicted": [1.0, 1.0], "position": [1.0, 2.0]}
    layer = {"layer": 1, "vectors": 2, "entries": 2, "raw_lengths": [0.5, 3.0]}
    layer |= {"lengths": [1.0, 1.0], "radius_error": 1e-15, "eps_error": 1e-15}
    return {"layers": [{**layer, "eps_shrink": 1e-6, "spectrum_error": 1e-12, "curve": curve}]}


def _invariance(training: dict[str, Any]) -> dict[str, Any]:
    size = 10.0 if training["method"] == "none" else 1e-13
    laws = {law: [size] * len(SCALES) for law in LAWS}
    # Proportional to the difference of eps/(a sigma)^2 from its value at a = 1.
    leak = [abs(1e-7 * (a**-2 - 1)) for a in SCALES]
    found: dict[str, Any] = {"exact": laws, "real": {**laws, "function": leak}}
    return found | ({"eps_identity": 1e-12} if training["method"] == "bn" else {})


def _growth(training: dict[str, Any]) -> dict[str, Any]:
    if not training["record"]:
        return {"error": 1e-14, "shrinking": 0.0}
    layer: dict[str, Any] = {"step": [1, 2], "norm": [1.0, 1.5], "rotation": [0.1, 0.1]}
    layer |= {"grew": 1.5, "late_rotation": 0.1, "free_norm": [1.0, 1.5]}
    if training["weight_decay"] == 0:
        layer |= {"exponent": 0.25, "free_ratio": 1.0, "spheres_grew": 1.0}
    else:
        layer |= {"predicted_rotation": 0.1, "rotation_ratio": 1.0}
    return {"layers": [dict(layer) for _ in range(3)]}


def _stability(training: dict[str, Any]) -> dict[str, Any]:
    usable = 3.0 if training["space"] == "sphere" else 0.3
    accuracy = 0.95 if 0.009 < training["lr"] < usable else 0.1
    return {"train_loss": 0.1 if accuracy > 0.5 else None, "test_accuracy": accuracy}


def _robustness(training: dict[str, Any]) -> dict[str, Any]:
    size = 0.7 if training["space"] == "sphere" else 0.5
    attacked = {"cross_entropy": size, "dlr": size, "worst": size}
    found = {"clean": 0.95, "clean_all": 0.95, "eps": [0.05, 0.1, 0.15, 0.2]}
    found |= {"robust": [dict(attacked) for _ in range(4)], "logits": dict(attacked)}
    moved = {key: value - 0.1 for key, value in attacked.items()}
    found |= {"gauge": moved, "gauge_change": 1e-6, "norm_growth": 1.5, "head_norm": 3.0}
    return found | ({"gauge": None, "gauge_change": None} if training["method"] == "none" else {})


def _causes(training: dict[str, Any]) -> dict[str, Any]:
    """Grown norms cost robustness, and so does making them larger."""
    grew = training["norm_growth"] > 1 or training["space"] == "plain"
    rows = [1, 1, 1, 0, 0] if grew else [1, 1, 1, 1, 0]
    found = {"clean_all": 0.95, "right": [1, 1, 1, 1, 1], "stands": rows, "cross_entropy": 0.9}
    found |= {"norm_growth": 2.0 if grew else 1.0, "head_growth": 3.0, "cross_entropy_loud": 0.95}
    controls = {"loud": list(rows)}
    if training["method"] != "none":
        controls |= {"rescaled": [1, 1, 0, 0, 0], "without eps": list(rows)}
    if training["method"] == "bn":
        controls["fresh statistics"] = list(rows)
    return found | {"controls": controls}


def _gain(training: dict[str, Any]) -> dict[str, Any]:
    shift = None if training["method"] == "rms" else 0.1
    layer = {"gain_spread": 0.8, "shift_mean": shift, "gain_spread_gauge": 0.1, "ratio": 1.0}
    return {"layers": [{**layer, "gain": [1.0, 2.0], "spread": [1.0, 2.0]} for _ in range(3)]}


_HOLDING = {
    "sphere": _sphere,
    "invariance": _invariance,
    "growth": _growth,
    "stability": _stability,
    "robustness": _robustness,
    "causes": _causes,
    "gain": _gain,
}


def records(claim: str, change: Change = lambda *_: None, plan: Plan = PLAN) -> Results:
    """Return a record for every cell of a claim under which it holds, each passed to a change."""
    found = {}
    for cell in CLAIMS[claim].cells(plan):
        if "trainings" in cell.config:
            pairs = [(_HOLDING[claim](dict(one)), dict(one)) for one in cell.config["trainings"]]
            found[cell.key] = {"trained": [record for record, _ in pairs]}
        else:
            training = dict(cell.config.get("training", cell.config))
            found[cell.key] = _HOLDING[claim](training)
            pairs = [(found[cell.key], training)]
        for record, training in pairs:
            change(record, training)
    return found
