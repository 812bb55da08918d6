"""Every judge can be convinced of the contrary: fabricated records, and the verdict they deserve.

Where a case names a number, it stands on the side of the written threshold that it says.
"""

import pytest

from onsphere.report.document import Verdict
from onsphere.studies.study import CLAIMS
from studies.fabricated import ONE_SEED, PLAN, records

HOLDS, IF, FAILS, OPEN = Verdict.HOLDS, Verdict.CONDITIONAL, Verdict.FAILS, Verdict.OPEN


def layers(where=lambda training: True, **values):
    """Set values in every layer of the chosen records (and in the record, where it has none)."""

    def change(record, training):
        if where(training):
            for one in record.get("layers", [record]):
                one.update({k: v for k, v in values.items() if k in one})

    return change


def alternating(where, what):
    """Make the layers of the chosen records miss in both directions, and be right on average."""

    def change(record, training):
        if where(training):
            for one, value in zip(record.get("layers", []), (0.7, 1.0, 1.3), strict=False):
                one.update({what: value} if what in one else {})

    return change


def law(name, value, method="ln"):
    def change(record, training):
        if training["method"] == method:
            record["exact"][name][3] = value

    return change


def leak(exponent):
    def change(record, training):
        record["real"]["function"] = [
            abs(1e-7 * a**exponent * (1 - a * a)) for a in (10.0 ** (k / 2) for k in range(-4, 5))
        ]

    return change


def of(method=None, **settings):
    """Choose records by their training."""
    wanted = settings | ({"method": method} if method else {})
    return lambda training: all(training[k] == v for k, v in wanted.items())


def usable(chosen, low, high, accuracy=0.95):
    """Make another range of rates the usable one."""

    def change(record, training):
        if chosen(training):
            record["test_accuracy"] = accuracy if low < training["lr"] < high else 0.1

    return change


def both(*changes):
    def change(record, training):
        for one in changes:
            one(record, training)

    return change


def attacked(chosen, value):
    """Set the robust accuracy at every radius; the gauge control follows it unmoved."""

    def change(record, training):
        if chosen(training):
            size = value(training) if callable(value) else value
            for one in [*record["robust"], *([record["gauge"]] if record["gauge"] else [])]:
                one.update(cross_entropy=size, dlr=size, worst=size)

    return change


def gauge_moves(by, method=None):
    def change(record, training):
        if record["gauge"] and method in (None, training["method"]):
            record["gauge"]["worst"] = record["robust"][1]["worst"] - by

    return change


def stands(chosen, rows):
    """Set the images that withstand the attack, and under every control."""

    def change(record, training):
        if chosen(training):
            moved = {name: list(rows) for name in record["controls"] if name != "rescaled"}
            record.update(stands=list(rows), controls=record["controls"] | moved)

    return change


def diverged(chosen):
    def change(record, training):
        if chosen(training):
            record.clear()
            record["diverged"] = True

    return change


def rescaled_as_before(record, training):
    if "rescaled" in record["controls"]:
        record["controls"]["rescaled"] = list(record["stands"])


def wrong_where_it_falls(record, training):
    """The image that plain networks lose to the attack is one that they get wrong without it."""
    if training["space"] == "plain":
        record["right"] = [1, 1, 1, 0, 1]


NOISE, TASK = {"objective": "noise"}, {"objective": "labels"}
ANY, SPHERE, PLAIN = of(), of(space="sphere"), of(space="plain")
GROWN = of(space="sphere", norm_growth=4.0)
SPHERE_LIKE_PLAIN = usable(SPHERE, 0.009, 0.3)
FIVE = ("bn", "ln", "in", "gn", "rms")


def only(methods, change):
    return lambda record, training: training["method"] in methods and change(record, training)


CASES = [
    ("sphere", "exact", lambda *_: None, HOLDS),
    ("sphere", "length at its threshold", layers(radius_error=1e-10), HOLDS),
    ("sphere", "length above it", layers(of("sn"), radius_error=1.1e-10), FAILS),
    ("sphere", "spectrum at its threshold", layers(spectrum_error=1e-8), HOLDS),
    ("sphere", "spectrum above it", layers(of("wn"), spectrum_error=1.1e-8), FAILS),
    ("sphere", "spectrum of one seed wrong", layers(of("bn", seed=2), spectrum_error=0.1), FAILS),
    ("sphere", "length of one seed wrong", layers(of("ln", seed=1), radius_error=0.1), FAILS),
    ("invariance", "exact", lambda *_: None, HOLDS),
    *[
        ("invariance", f"{name} off", law(name, 1.1e-9), FAILS)
        for name in ("function", "radial", "gradient", "hessian", "euler")
    ],
    ("invariance", "laws at their threshold", law("hessian", 1e-9), HOLDS),
    ("invariance", "laws of the control", law("euler", 1e5, "none"), HOLDS),
    (
        "invariance",
        "control invariant too",
        lambda r, t: r["exact"].update(function=[1e-3] * 9) if t["method"] == "none" else None,
        FAILS,
    ),
    ("invariance", "leak as 1/a", leak(-1.0), FAILS),
    ("invariance", "leak as a^-1.95", leak(-1.95), HOLDS),
    ("invariance", "leak as a^-2.2", leak(-2.2), FAILS),
    (
        "invariance",
        "a leak that saturates",  # of InstanceNorm in a quick run
        lambda r, t: r["real"].update(
            function=[4.1e-2, 7.8e-3, 1.1e-3, 1.1e-4, 0, 1.1e-5, 1.2e-5, 1.2e-5, 1.2e-5]
        ),
        HOLDS,
    ),
    ("invariance", "no leak seen", lambda r, t: r["real"].update(function=[0.0] * 9), FAILS),
    (
        "invariance",
        "eps identity off",
        lambda r, t: r.update(eps_identity=1e-3) if t["method"] == "bn" else None,
        FAILS,
    ),
    ("growth", "exact", lambda *_: None, HOLDS),
    ("growth", "recursion off", layers(of("cwn", seed=1), error=1.1e-10), FAILS),
    ("growth", "recursion at its threshold", layers(error=1e-10), HOLDS),
    ("growth", "recursion of the control off", layers(of("none"), error=0.5), HOLDS),
    (
        "growth",
        "shrinks under SGD",
        layers(of("gn", momentum=0.0, weight_decay=0.0), shrinking=0.5),
        FAILS,
    ),
    (
        "growth",
        "shrinks under decay",
        layers(of(momentum=0.0, weight_decay=5e-3), shrinking=1.0),
        HOLDS,
    ),
    ("growth", "shrinks under momentum", layers(of(momentum=0.9), shrinking=0.5), HOLDS),
    ("growth", "control shrinks", layers(of("none"), shrinking=0.5), HOLDS),
    ("growth", "grows too little", layers(of("sn", weight_decay=0.0, **TASK), grew=1.04), FAILS),
    ("growth", "shrinks with decay", layers(of(weight_decay=5e-3), grew=0.5), HOLDS),
    ("growth", "other exponent on the task", layers(of("ln", **TASK), exponent=0.1), IF),
    ("growth", "other exponent on noise", layers(of("ln", **NOISE), exponent=0.29), IF),
    ("growth", "exponent within 15 %", layers(exponent=0.28), HOLDS),
    ("growth", "no exponent at all", layers(of("ln", **TASK), exponent=None), IF),
    ("growth", "other growth on noise", layers(of("in", **NOISE), free_ratio=1.3), IF),
    ("growth", "misses that cancel", alternating(of("sn", **NOISE), "rotation_ratio"), IF),
    ("growth", "other rotation on the task", layers(of("bn", **TASK), rotation_ratio=1.2), IF),
    ("growth", "other rotation on noise", layers(of("bn", **NOISE), rotation_ratio=0.8), IF),
    (
        "growth",
        "all of one method diverged on noise",
        lambda r, t: r.update(layers=[]) if of("rms", **NOISE)(t) and t["record"] else None,
        IF,
    ),
    ("stability", "a decade wider for all", lambda *_: None, HOLDS),
    ("stability", "as wide", SPHERE_LIKE_PLAIN, FAILS),
    ("stability", "narrower for all", usable(SPHERE, 0.09, 0.3), FAILS),
    (
        "stability",
        "wider for one",
        both(SPHERE_LIKE_PLAIN, usable(of("bn", space="sphere"), 0.009, 3.0)),
        IF,
    ),
    (
        "stability",
        "wider for one and narrower for one",
        both(
            SPHERE_LIKE_PLAIN,
            usable(of("bn", space="sphere"), 0.009, 3.0),
            usable(of("ln", space="sphere"), 0.09, 0.3),
        ),
        FAILS,
    ),
    ("stability", "wider for all but one", usable(of("wn", space="sphere"), 0.09, 0.3), IF),
    ("stability", "wide by being bad everywhere", usable(SPHERE, 0.0, 1e9, accuracy=0.9), FAILS),
    (
        "stability",
        "wide in one seed of three",
        both(SPHERE_LIKE_PLAIN, usable(of(space="sphere", seed=0), 0.009, 3.0)),
        OPEN,
    ),
    ("robustness", "sphere better and the norm matters", lambda *_: None, HOLDS),
    ("robustness", "the norm does not matter", gauge_moves(0.0), IF),
    ("robustness", "the norm hardly matters", gauge_moves(0.007), IF),
    (
        "robustness",
        "the norm matters for one method",
        both(gauge_moves(0.0), gauge_moves(0.02, "in")),
        HOLDS,
    ),
    ("robustness", "scaling up helps", gauge_moves(-0.1), HOLDS),
    ("robustness", "no better on the sphere", attacked(SPHERE, 0.5), FAILS),
    ("robustness", "worse on the sphere", attacked(SPHERE, 0.3), FAILS),
    ("robustness", "hardly better on the sphere", attacked(SPHERE, 0.51), FAILS),
    (
        "robustness",
        "better in one seed of three",
        attacked(SPHERE, lambda t: 0.9 if t["seed"] == 0 else 0.49),
        OPEN,
    ),
    ("causes", "the norm as such", lambda *_: None, HOLDS),
    ("causes", "only forced", rescaled_as_before, HOLDS),
    ("causes", "only rescaled", stands(of(norm_growth=4.0), [1, 1, 1, 1, 0]), HOLDS),
    ("causes", "another way", both(rescaled_as_before, stands(GROWN, [1, 1, 1, 1, 0])), IF),
    ("causes", "plain as robust", stands(PLAIN, [1, 1, 1, 1, 0]), FAILS),
    ("causes", "plain more robust", stands(PLAIN, [1, 1, 1, 1, 1]), FAILS),
    ("causes", "less robust where it is wrong anyway", wrong_where_it_falls, FAILS),
    ("causes", "one network diverged", diverged(of("wn", space="plain", seed=1)), HOLDS),
    ("causes", "in one seed of three", stands(of(space="plain", seed=1), [1, 1, 1, 1, 0]), OPEN),
    ("gain", "tracks in all", lambda *_: None, HOLDS),
    ("gain", "tracks in five of seven", only(("wn", "cwn"), layers(gain_spread=0.0)), HOLDS),
    ("gain", "tracks in two of seven", only(FIVE, layers(gain_spread=0.49)), IF),
    ("gain", "tracks in none", layers(gain_spread=0.49), FAILS),
    ("gain", "against each other", layers(gain_spread=-0.9), FAILS),
    (
        "gain",
        "tracks in one seed of three",
        lambda r, t: layers(gain_spread=1.0 if t["seed"] == 0 else 0.3)(r, t),
        FAILS,
    ),
]


@pytest.mark.parametrize(
    ("claim", "change", "verdict"),
    [(claim, change, verdict) for claim, _, change, verdict in CASES],
    ids=[f"{claim}: {name}" for claim, name, *_ in CASES],
)
def test_the_verdict_is_what_the_threshold_says(claim, change, verdict):
    section = CLAIMS[claim].section(PLAN, records(claim, change), "onsphere study")
    assert section.verdict is verdict


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_case_starts_from_a_claim_that_holds_and_shakes_it(claim):
    verdicts = [verdict for name, _, _, verdict in CASES if name == claim]
    assert {HOLDS, FAILS} <= set(verdicts)


@pytest.mark.parametrize("claim", [name for name, c in CLAIMS.items() if "One seed" in c.threshold])
def test_one_seed_decides_nothing_where_that_is_written(claim):
    section = CLAIMS[claim].section(ONE_SEED, records(claim, plan=ONE_SEED), "onsphere study")
    assert section.verdict is OPEN


def test_that_is_written_where_verdicts_rest_on_seeds():
    written = {name for name, claim in CLAIMS.items() if "One seed" in claim.threshold}
    assert written >= {"stability", "robustness", "gain"}


def finding(claim, change, start):
    section = CLAIMS[claim].section(PLAN, records(claim, change), "onsphere study")
    (found,) = [text for text in section.findings if text.startswith(start)]
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda *_: None, "at most 0.100: here the norm itself matters"),
        (
            gauge_moves(0.0),
            "at most 0.000: the norm of a normalized weight does not amplify an attack",
        ),
    ],
)
def test_the_cause_is_what_the_rescale_showed(change, says):
    assert says in finding("robustness", change, "Cause:")


def test_masked_gradients_are_told_from_robustness():
    def masked(record, training):
        record["logits"]["cross_entropy"] = record["robust"][1]["cross_entropy"] + 0.25

    assert "cross-entropy attack by 0.25 [0.25, 0.25]" in finding("robustness", masked, "Masking:")
    assert "moves by at most 0.000" in finding("robustness", masked, "Masking:")


def test_effects_come_with_their_causes_and_sizes():
    assert finding("causes", lambda *_: None, "All of it: plain") == (
        "All of it: plain − sphere −0.2 [−0.2, −0.2]."
    )
    assert "nothing that matters" in finding("causes", rescaled_as_before, "The norm as such: w")
    assert "0.3 [0.3" in finding("causes", lambda *_: None, "Masking: PGD")


def test_the_methods_that_are_narrower_are_named():
    change = usable(of("wn", space="sphere"), 0.09, 0.3)
    assert finding("stability", change, "Narrower").startswith("Narrower on the sphere: WN; wider")


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_section_says_what_was_predicted_and_measured(claim):
    section = CLAIMS[claim].section(PLAN, records(claim), f"onsphere study {claim}")
    assert section.threshold.startswith("Holds if ")
    assert section.findings
    assert section.conditions
    assert section.figures
    assert section.tables
    assert section.command.endswith(claim)
