"""Every statement can be convinced of the contrary: fabricated records, and what they deserve.

Where a case names a number, it stands on the side of the written margin that it says.
"""

import pytest

from onsphere.report import Outcome
from onsphere.studies.claims.plan import Plan
from onsphere.studies.claims.statement import Decision, decide, shown
from onsphere.studies.setup.statistics import Estimate
from onsphere.studies.study import CLAIMS
from studies.fabricated import ONE_SEED, PLAN, outcomes, records, rows

HOLDS, REVERSED, ABSENT = Outcome.HOLDS, Outcome.REVERSED, Outcome.ABSENT
MIXED, OPEN = Outcome.MIXED, Outcome.OPEN


def of(task, where=lambda training: True, **wanted):
    """Choose records by their task and training."""
    return lambda name, training: (
        name == task and where(training) and all(training[k] == v for k, v in wanted.items())
    )


def changed(chosen, alter):
    """Alter the chosen records in place."""

    def change(name, record, training):
        if chosen(name, training):
            alter(record, training)

    return change


def layers(chosen, **values):
    """Set values in every layer of the chosen records (and in the record, where it has none)."""

    def alter(record, _):
        for one in record.get("layers", [record]):
            one.update({k: v for k, v in values.items() if k in one})

    return changed(chosen, alter)


def by_seed(chosen, what, values):
    """Set a value in every layer, another one for each seed."""
    return changed(
        chosen, lambda record, t: [o.update({what: values[t["seed"]]}) for o in record["layers"]]
    )


def law(name, value, method="ln"):
    return changed(
        of("invariance.measure", method=method),
        lambda record, _: record["exact"].update({name: [None, *[value] * 8]}),
    )


def leak(exponent):
    scales = [10.0 ** (k / 2) for k in range(-4, 5)]
    values = [1e-7 * a**exponent for a in scales]
    return changed(of("invariance.measure"), lambda record, _: record.update(leak=values))


def edge(plain, sphere, where=lambda _: True):
    """Set the largest usable rates; numbers, or functions of the seed."""

    def alter(record, training):
        ends = [e(training["seed"]) if callable(e) else e for e in (plain, sphere)]
        record["edge"] = dict(zip(("plain", "sphere"), ends, strict=True))

    return changed(of("stability.edge", where), alter)


def network(number, stands, group=4, where=lambda _: True):
    """Set which images withstand the attack on a network of a group (of so many networks)."""

    def alter(record, training):
        if len(record["networks"]) == group:
            robust = stands(training["seed"]) if callable(stands) else stands
            record["networks"][number]["stands"] = rows(robust)

    return changed(of("robustness.attack", where), alter)


def control(name, stands):
    def alter(record, _):
        target = record if name in record else record["controls"]
        target[name] = rows(stands)

    return changed(of("robustness.control"), alter)


def snapshots(task, place, **values):
    """Set values in one snapshot of a run, in all its layers."""

    def alter(record, _):
        snapshot = record["snapshots"][place]
        for name, value in values.items():
            if isinstance(snapshot, dict):
                snapshot[name] = [value] * 3
            else:
                for layer in snapshot:
                    layer[name] = value

    return changed(of(task), alter)


def both(*changes):
    def change(*given):
        for one in changes:
            one(*given)

    return change


def accuracies(task, sphere, plain=None):
    """Set the accuracies of the networks of a group by their space."""

    def alter(record, _):
        half = {"stability.start": len(record["trained"]) // 2}.get(
            task, len(record["trained"]) - 3
        )
        for i, one in enumerate(record["trained"]):
            own = plain if i < half else sphere
            if own is not None:
                one["test_accuracy"] = own[i % len(own)]

    return changed(of(task), alter)


LAWS = "growth.laws"
NOISE, TASK = {"objective": "noise"}, {"objective": "labels"}
NOTHING = changed(lambda *_: False, lambda *_: None)
WOBBLE = (-0.004, 0.004, -0.002, 0.002)

CASES = [
    ("sphere", "lengths", "exact", NOTHING, HOLDS),
    (
        "sphere",
        "lengths",
        "at the tolerance",
        layers(of("sphere.measure"), radius_error=1e-10),
        HOLDS,
    ),
    (
        "sphere",
        "lengths",
        "one method above it",
        layers(of("sphere.measure", method="sn"), radius_error=1.1e-10),
        MIXED,
    ),
    ("sphere", "lengths", "all wrong", layers(of("sphere.measure"), radius_error=0.1), REVERSED),
    ("sphere", "spectrum", "wrong", layers(of("sphere.measure"), spectrum_error=0.1), REVERSED),
    ("sphere", "eps", "wrong", layers(of("sphere.measure"), eps_error=0.1), REVERSED),
    (
        "sphere",
        "lengths",
        "the seed that is asked wrong",
        layers(of("sphere.measure", seed=0), radius_error=0.1),
        REVERSED,
    ),
    ("invariance", "function", "off for LN", law("function", 1.1e-9), MIXED),
    ("invariance", "function", "at the tolerance", law("function", 1e-9), HOLDS),
    ("invariance", "gradient", "radial off for LN", law("radial", 1.1e-9), MIXED),
    ("invariance", "gradient", "size off for LN", law("gradient", 1.1e-9), MIXED),
    ("invariance", "curvature", "Hessian off for LN", law("hessian", 1.1e-9), MIXED),
    ("invariance", "curvature", "off for LN", law("euler", 1.1e-9), MIXED),
    ("invariance", "control", "not invariant", NOTHING, HOLDS),
    ("invariance", "control", "invariant too", law("function", 1e-3, "none"), REVERSED),
    ("invariance", "leak", "as 1/a", leak(-1.0), REVERSED),
    ("invariance", "leak", "as a^-1.95", leak(-1.95), HOLDS),
    ("invariance", "leak", "as a^-2.2", leak(-2.2), REVERSED),
    (
        "invariance",
        "leak",
        "none seen",
        changed(of("invariance.measure"), lambda r, _: r.update(leak=[0.0] * 9)),
        REVERSED,
    ),
    (
        "invariance",
        "eps",
        "off",
        changed(of("invariance.measure", method="bn"), lambda r, _: r.update(eps_identity=1e-3)),
        REVERSED,
    ),
    ("growth", "recursion", "exact", NOTHING, HOLDS),
    (
        "growth",
        "recursion",
        "off for CWN",
        layers(of("growth.recursion", method="cwn", momentum=0.9), error=1.1e-10),
        MIXED,
    ),
    (
        "growth",
        "no-shrinking",
        "shrinks under SGD",
        layers(of("growth.recursion", momentum=0.0, weight_decay=0.0), shrinking=0.5),
        REVERSED,
    ),
    (
        "growth",
        "no-shrinking",
        "shrinks under decay and momentum only",
        layers(of("growth.recursion", lambda t: t["momentum"] or t["weight_decay"]), shrinking=1.0),
        HOLDS,
    ),
    ("growth", "grows", "in all", NOTHING, HOLDS),
    ("growth", "grows", "hardly", layers(of(LAWS, weight_decay=0.0, **TASK), grew=1.02), ABSENT),
    ("growth", "grows", "shrinks", layers(of(LAWS, weight_decay=0.0, **TASK), grew=0.8), REVERSED),
    (
        "growth",
        "grows",
        "one layer does not",
        changed(of(LAWS, weight_decay=0.0, **TASK), lambda r, _: r["layers"][1].update(grew=1.0)),
        ABSENT,
    ),
    ("growth", "settles", "at the end", NOTHING, HOLDS),
    ("growth", "settles", "still grows", layers(of(LAWS), late_growth=1.2), REVERSED),
    ("growth", "quarter-power-on-task", "1/4", NOTHING, HOLDS),
    ("growth", "quarter-power-on-task", "1/2", layers(of(LAWS), exponent=0.5), REVERSED),
    (
        "growth",
        "quarter-power-on-task",
        "none at all",
        changed(
            of(LAWS, weight_decay=0.0, **TASK), lambda r, _: r["layers"][0].update(exponent=None)
        ),
        REVERSED,
    ),
    ("growth", "growth-from-gradients", "off", layers(of(LAWS, **NOISE), free_ratio=1.3), REVERSED),
    (
        "growth",
        "growth-from-gradients",
        "on the task",
        layers(of(LAWS, **TASK), free_ratio=9),
        HOLDS,
    ),
    ("growth", "rotation-on-task", "off", layers(of(LAWS, **TASK), rotation_ratio=1.2), REVERSED),
    ("growth", "rotation-on-noise", "off", layers(of(LAWS, **NOISE), rotation_ratio=0.8), REVERSED),
    (
        "growth",
        "rotation-on-noise",
        "misses of two layers that would cancel",
        changed(
            of(LAWS, **NOISE, weight_decay=2e-3),
            lambda r, _: [
                one.update(rotation_ratio=v)
                for one, v in zip(r["layers"], (0.7, 1.0, 1.3), strict=True)
            ],
        ),
        REVERSED,
    ),
    (
        "growth",
        "rotation-on-task",
        "seeds too far apart to say",
        by_seed(of(LAWS, **TASK, weight_decay=5e-3), "rotation_ratio", (1.0, 1.3, 0.8, 1.0)),
        OPEN,
    ),
    (
        "growth",
        "grows",
        "all diverged for RMS",
        changed(of(LAWS, method="rms"), lambda r, _: r.update(layers=[])),
        HOLDS,
    ),
    ("stability", "start", "same accuracy", NOTHING, HOLDS),
    ("stability", "start", "not", accuracies("stability.start", [0.9, 0.5]), REVERSED),
    ("stability", "start-plain", "it matters", NOTHING, HOLDS),
    (
        "stability",
        "start-plain",
        "it does not",
        accuracies("stability.start", [0.9], [0.9]),
        ABSENT,
    ),
    (
        "stability",
        "start-plain",
        "to the sphere it does",
        accuracies("stability.start", [0.9, 0.5], [0.9]),
        REVERSED,
    ),
    ("stability", "rates", "a decade more", NOTHING, HOLDS),
    ("stability", "rates", "the same", edge(1.0, 1.0), ABSENT),
    ("stability", "rates", "a fifth of a decade more", edge(1.0, 10**0.2), ABSENT),
    ("stability", "rates", "half a decade less", edge(1.0, 10**-0.5), REVERSED),
    (
        "stability",
        "rates",
        "less for one method",
        edge(1.0, 0.1, lambda t: t["method"] == "wn"),
        MIXED,
    ),
    (
        "stability",
        "rates",
        "in one seed of four",
        edge(1.0, lambda s: 10.0 if s == 0 else 1.0),
        OPEN,
    ),
    ("stability", "best", "higher", NOTHING, HOLDS),
    (
        "stability",
        "best",
        "lower",
        changed(of("stability.edge"), lambda r, _: r["accuracy"].update(sphere=[0.8] * 6)),
        REVERSED,
    ),
    ("stability", "rate-and-decay", "plain works without decay only", NOTHING, HOLDS),
    (
        "stability",
        "rate-and-decay",
        "plain works everywhere, the sphere nowhere",
        accuracies("stability.part", [0.2], [0.95]),
        REVERSED,
    ),
    ("stability", "no-warm-up", "plain has spikes", NOTHING, HOLDS),
    (
        "stability",
        "no-warm-up",
        "the sphere has them",
        changed(of("stability.part"), lambda r, _: r["trained"].reverse()),
        REVERSED,
    ),
    ("stability", "rate-left", "it fell", NOTHING, HOLDS),
    ("stability", "rate-left", "it did not", layers(of(LAWS), grew=1.0), ABSENT),
    ("stability", "rate-left", "it rose", layers(of(LAWS), grew=0.5), REVERSED),
    ("stability", "seeds", "plain strays", NOTHING, HOLDS),
    (
        "stability",
        "seeds",
        "the sphere strays",
        changed(
            of("stability.edge"),
            lambda r, _: r.update(
                loss={"plain": r["loss"]["sphere"], "sphere": r["loss"]["plain"]}
            ),
        ),
        REVERSED,
    ),
    ("robustness", "raw-layers", "in proportion", NOTHING, HOLDS),
    (
        "robustness",
        "raw-layers",
        "not at all",
        snapshots("robustness.amplification", -1, raw=3.0),
        REVERSED,
    ),
    ("robustness", "behind-normalization", "grows", NOTHING, HOLDS),
    (
        "robustness",
        "behind-normalization",
        "stays",
        snapshots("robustness.amplification", -1, behind=1.0),
        ABSENT,
    ),
    ("robustness", "norm-as-such", "costs", NOTHING, HOLDS),
    ("robustness", "norm-as-such", "nothing moves", control("rescaled", 40), ABSENT),
    ("robustness", "norm-as-such", "one image in a hundred", control("rescaled", 39), ABSENT),
    ("robustness", "norm-as-such", "helps", control("rescaled", 50), REVERSED),
    ("robustness", "norm-forced", "costs", NOTHING, HOLDS),
    ("robustness", "norm-forced", "nothing", network(4, 50, 6), ABSENT),
    ("robustness", "effective-rate", "costs", NOTHING, HOLDS),
    (
        "robustness",
        "effective-rate",
        "helps",
        both(*(network(place, 50 + 9 * place, 6) for place in (1, 2, 3))),
        REVERSED,
    ),
    (
        "robustness",
        "effective-rate",
        "nothing",
        both(*(network(place, 50, 6) for place in (1, 2, 3))),
        ABSENT,
    ),
    ("robustness", "all-of-it", "plain less robust", NOTHING, HOLDS),
    ("robustness", "all-of-it", "plain more robust", network(0, 60), REVERSED),
    (
        "robustness",
        "all-of-it",
        "less robust on images that it gets wrong anyway",
        both(
            network(0, 50),
            changed(
                of("robustness.attack"),
                lambda r, _: [o.update(right=rows(40)) for o in r["networks"]],
            ),
        ),
        ABSENT,
    ),
    ("robustness", "decay", "helps", NOTHING, HOLDS),
    ("robustness", "decay", "harms", network(1, 30), REVERSED),
    (
        "robustness",
        "decay",
        "in one seed of four",
        network(1, lambda s: 60 if s == 1 else 40),
        OPEN,
    ),
    ("robustness", "decay-hidden", "helps", NOTHING, HOLDS),
    ("robustness", "decay-hidden", "nothing", network(2, 40), ABSENT),
    ("robustness", "decay-head", "helps", NOTHING, HOLDS),
    ("robustness", "decay-head", "nothing", network(3, 40), ABSENT),
    ("robustness", "head-held", "helps", NOTHING, HOLDS),
    ("robustness", "head-held", "harms", network(5, 40, 6), REVERSED),
    ("robustness", "deceived", "by a third", NOTHING, HOLDS),
    ("robustness", "deceived", "by nothing", control("cross_entropy_loud", 50), ABSENT),
    ("robustness", "missed", "a tenth", NOTHING, HOLDS),
    ("robustness", "missed", "nothing", control("cross_entropy", 40), ABSENT),
    ("robustness", "statistics", "cost", NOTHING, HOLDS),
    ("robustness", "statistics", "nothing", control("fresh statistics", 40), ABSENT),
    (
        "robustness",
        "decay",
        "one network diverged",
        changed(
            of("robustness.attack", seed=2),
            lambda r, _: r["networks"].__setitem__(1, {"diverged": True}),
        ),
        HOLDS,
    ),
    ("gain", "gain-approaches", "halved", NOTHING, HOLDS),
    ("gain", "gain-approaches", "stays", snapshots("gain.measure", -1, gain_distance=1.0), ABSENT),
    (
        "gain",
        "gain-approaches",
        "grows",
        snapshots("gain.measure", -1, gain_distance=3.0),
        REVERSED,
    ),
    ("gain", "shift-approaches", "halved", NOTHING, HOLDS),
    (
        "gain",
        "shift-approaches",
        "grows",
        snapshots("gain.measure", -1, shift_distance=3.0),
        REVERSED,
    ),
    ("gain", "gain-stabilizes", "slows", NOTHING, HOLDS),
    (
        "gain",
        "gain-stabilizes",
        "quickens",
        snapshots("gain.measure", -1, gain=[90.0, 9.0]),
        REVERSED,
    ),
    ("gain", "gain-tracks-spread", "tracks", NOTHING, HOLDS),
    ("gain", "gain-tracks-spread", "hardly", layers(of("gain.measure"), gain_spread=0.3), ABSENT),
    (
        "gain",
        "gain-tracks-spread",
        "against",
        layers(of("gain.measure"), gain_spread=-0.9),
        REVERSED,
    ),
    (
        "gain",
        "gain-tracks-spread",
        "seeds disagree",
        by_seed(of("gain.measure"), "gain_spread", (0.9, -0.9, 0.5, -0.5)),
        OPEN,
    ),
    ("gain", "gain-is-length", "by construction", NOTHING, HOLDS),
    ("gain", "gain-is-length", "it is not", layers(of("gain.length"), error=0.1), REVERSED),
]


@pytest.mark.parametrize(
    ("claim", "statement", "change", "outcome"),
    [(claim, statement, change, outcome) for claim, statement, _, change, outcome in CASES],
    ids=[f"{claim}: {statement}: {name}" for claim, statement, name, *_ in CASES],
)
def test_the_outcome_is_what_the_rule_says(claim, statement, change, outcome):
    assert outcomes(claim, change)[statement] is outcome


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_statement_holds_somewhere_and_somewhere_not(claim):
    holding = outcomes(claim)
    assert set(holding.values()) == {HOLDS}
    contrary = {statement for name, statement, _, _, outcome in CASES if outcome is not HOLDS}
    assert set(holding) <= contrary


@pytest.mark.parametrize("claim", CLAIMS)
def test_one_seed_decides_what_is_an_identity_and_nothing_else(claim):
    found = outcomes(claim, plan=ONE_SEED)
    for one in CLAIMS[claim].statements:
        assert found[one.name] is (HOLDS if one.kind == "identity" else OPEN)


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_section_says_what_it_means_and_how_it_is_decided(claim):
    results = records(claim)
    decisions = decide(CLAIMS[claim].statements, PLAN, results)
    section = CLAIMS[claim].section(PLAN, results, decisions, f"onsphere study {claim}")
    assert section.advice.endswith(".")
    assert section.conditions
    assert section.figures
    assert section.tables
    assert section.command.endswith(claim)
    for one in section.statements:
        assert one.hypothesis.endswith(".")
        assert one.effect
        assert one.intervals
        assert "olds if" in one.rule
        assert one.margin in one.rule or "between" in one.rule


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_advice_follows_the_outcomes(claim):
    advice = CLAIMS[claim].advice
    names = [one.name for one in CLAIMS[claim].statements]
    said = {advice(dict.fromkeys(names, outcome)) for outcome in (HOLDS, REVERSED, OPEN)}
    assert len(said) > 1
    assert all(text[0].isupper() and text.endswith(".") for text in said)


def test_methods_that_differ_are_named():
    results = records("stability", edge(1.0, 0.1, lambda t: t["method"] == "wn"))
    claim = CLAIMS["stability"]
    decisions = decide(claim.statements, PLAN, results)
    section = claim.section(PLAN, results, decisions, "")
    (rates,) = [one for one in section.statements if one.name == "rates"]
    assert rates.outcome is MIXED
    assert "Reversed for WN." in rates.note


def test_what_is_undecided_says_how_many_seeds_it_takes():
    results = records("stability", edge(1.0, lambda s: 10.0 if s == 0 else 1.0))
    claim = CLAIMS["stability"]
    section = claim.section(PLAN, results, decide(claim.statements, PLAN, results), "")
    (rates,) = [one for one in section.statements if one.name == "rates"]
    assert "With 4 seeds an effect of" in rates.note
    assert "seeds would probably decide" in rates.note


def test_what_few_seeds_show_says_what_asks_more_of_them():
    left = Decision(OPEN, Estimate(0.0, -1.0, 1.0, 5), needed=20.0, detectable=1.0)
    few, other = (
        next(one for one in CLAIMS["stability"].statements if one.few is given)
        for given in (True, False)
    )
    plan, rounds = Plan(seeds=tuple(range(25))), Plan(seeds=tuple(range(8)), looks=(4, 8))
    notes = [
        shown(one, asked, {(one.name, m): left for m in one.methods(asked)}).note
        for one, asked in ((few, plan), (few, rounds), (other, plan))
    ]
    assert ["Without --until-decided at most 5 are asked" in note for note in notes] == [
        True,
        False,
        False,
    ]


def test_seeds_that_are_left_out_are_counted_by_method():
    one = CLAIMS["stability"].statements[0]
    kept = Decision(OPEN, Estimate(0.0, -1.0, 1.0, 3), lost=2)
    decisions = dict.fromkeys([(one.name, m) for m in one.methods(PLAN)], kept)
    decisions[one.name, "wn"] = Decision(OPEN, None, lost=5)
    note = shown(one, PLAN, decisions).note
    assert "Seeds left out, since a run diverged: BN 2 of 5, LN 2 of 5, WN 5 of 5." in note


def test_margins_and_names_are_given_once():
    for claim in CLAIMS.values():
        names = [one.name for one in claim.statements]
        assert len(names) == len(set(names))
        assert all(one.margin >= 0 for one in claim.statements)
    assert Plan().looks == (3,)
