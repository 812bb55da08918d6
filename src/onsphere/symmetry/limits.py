"""What an audit could not see, and what it assumed, in words."""

from collections import Counter
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from onsphere.symmetry.claims import Limit
from onsphere.symmetry.exact.rules.taught import TAUGHT
from onsphere.symmetry.exact.trace import Trace


def on_reads(traced: Trace, without_memory: bool = False) -> list[Limit]:
    """Say where Python reads the values of weights."""
    return [
        Limit(
            "reads", tuple(sorted(names)),
            f"Python reads numbers that depend on {_listed(sorted(names)) or 'weights'} in "
            + (f"module {where!r}" if where else "the model")
            + " (float(), .item(), .tolist()), which hides their scale: "
            + ("they were not to be had without memory, so 1 was taken for them, and symmetries "
               "through such numbers are not found." if without_memory else
               "of symmetries through such numbers, only those of one weight alone are found."),
        )
        for where, names in traced.reads.items()
    ]  # fmt: skip


def on_refuted(refuted: Sequence[Collection[str]], traced: Trace) -> list[Limit]:
    """Say what operations give and numbers refute, and which rules of a user's may be wrong there.

    Args:
        refuted: the weights of each symmetry that operations give and numbers refute.
        traced: what the operations say.
    """
    met = Counter(
        op for names in refuted for op, inside in traced.taught.items()
        if not inside.isdisjoint(names)
    )  # fmt: skip
    inside = {n for op in met for n in traced.taught[op]}
    doubtful = {n for names in refuted if not inside.isdisjoint(names) for n in names}
    others = {n for names in refuted if inside.isdisjoint(names) for n in names}
    rules = [op for op, _ in met.most_common()]
    given = "The operations give symmetries of {} that the numbers refute, so these are not claimed"
    return [
        *_on_some(
            "rules", doubtful,
            f"{given}: look at the rule{'s' if len(rules) > 1 else ''} of {_listed(rules)}, or "
            "at an eps that note_eps does not name there.",
        ),
        *_on_some(
            "refuted", others,
            f"{given}: steps, thresholds or sizes of what depends on these weights show in numbers "
            "only.",
        ),
    ]  # fmt: skip


def on_rules_of_nothing(traced: Trace) -> list[Limit]:
    """Say which rules of a user's are for no operation, where operations without a rule ran."""
    without_rule = sorted({op.name for op in traced.unknown})
    libraries = {name.partition("::")[0] for name in without_rule}
    found = []
    for name in TAUGHT.without_operation() if without_rule else ():
        near = get_close_matches(name, without_rule, 1)
        if not near and name.partition("::")[0] not in libraries:
            continue  # it has nothing to do with this model
        meant = f"; did you mean {near[0]}?" if near else "."
        words = f"A rule is registered for {name}, and there is no operation of this name{meant}"
        found.append(Limit("rules", (), words))
    return found


def on_moving(traced: Trace) -> list[Limit]:
    """Say which buffers a model writes while it runs."""
    return _on_some(
        "buffers", traced.moving,
        "The model writes {} while it runs: of symmetries that these move along with, only those "
        "that units give are found.",
    )  # fmt: skip


def on_doubtful(names: Collection[str]) -> list[Limit]:
    """Say of which weights the numbers do not tell whether they have an effect."""
    return _on_some(
        "effect", names,
        "Whether {} can affect the output is not told: no large change of it changed the output by "
        "more than rounding, yet its gradient is not 0, or it acts where an eps does.",
    )  # fmt: skip


def on_large(names: Collection[str]) -> list[Limit]:
    """Say of which weights too many rows and columns hang together."""
    return _on_some(
        "size", names,
        "So many rows and columns of {} hang together that symmetries by row, column and channel "
        "were not looked for there.",
    )  # fmt: skip


def on_hidden() -> Limit:
    """Say that gradients tell nothing of further symmetries."""
    return Limit(
        "search", (),
        "Whether there are symmetries beyond those that units give is not told: at the random "
        "weights that were tried, rounding hides what gradients say.",
    )  # fmt: skip


def on_constant() -> Limit:
    """Say that nothing changes the output."""
    return Limit(
        "constant", (),
        "The output stayed the same at all random weights and inputs that were tried, whatever "
        "weights changed: which of them have an effect where it does not is not told.",
    )  # fmt: skip


def on_another_model(differs: str) -> Limit:
    """Say that the run in float64 is not the model."""
    return Limit(
        "float64", (),
        f"Run in float64, this model gives something else: {differs}. Nothing can be shown of it "
        "that way, so nothing is claimed.",
    )  # fmt: skip


def on_gradients(why: str) -> Limit:
    """Say that a model has no gradients."""
    return Limit(
        "gradients", (),
        f"No gradients were to be had ({why}): symmetries are exact by units and certified by "
        "finite rescales; further ones, inert weights, shifts and parts were not looked for.",
    )  # fmt: skip


def on_unreached(unreached: Collection[str]) -> list[str]:
    """Say what it means that no input reached some weights."""
    if not unreached:
        return []
    return [
        f"No input that was tried reached {_listed(sorted(unreached))}: what is claimed of other "
        "weights holds as long as none does."
    ]


def on_unread_entries(traced: Trace) -> list[str]:
    """Say what it means that some entries of a weight were not read."""
    names = sorted(traced.unread_entries)
    if not names:
        return []
    verb = "was" if len(names) == 1 else "were"
    return [
        f"{_listed(names)} {verb} read in part only, as a table of positions longer than these "
        "inputs is: nothing is claimed of the other entries, and no shift of the weight."
    ]


def read_weights(traced: Trace) -> list[str]:
    """Return the parameters whose values Python reads."""
    return sorted({n for names in traced.reads.values() for n in names if n in traced.parameters})


def _on_some(kind: str, names: Collection[str], words: str) -> list[Limit]:
    """Return a limit on some weights, which stand in the words; none where there are none."""
    some = sorted(names)
    return [Limit(kind, tuple(some), words.format(_listed(some)))] if some else []


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
