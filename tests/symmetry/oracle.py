"""Audit random networks, and judge what is said by an oracle that shares no code with the library.

:mod:`symmetry.judge` puts every claim into practice, :mod:`symmetry.misses` looks for symmetries
that were not claimed. A miss is counted only where a symmetry was shown: its exponents are known,
and rescales by it leave the outputs alone at every weight and input that was tried.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

from torch import nn

from symmetry.judge import IllConditioned, Judge, Place, change, evaluate, replacing, scaling, shown
from symmetry.misses import Search, Symmetry
from symmetry.networks import Case, plain_case

Verdict = tuple[str, str]
"""``"false"``, ``"missed"`` or ``"note"``, and a line that says what."""


def count_wrong(
    seeds: Iterable[int],
    report: Callable[[int, str], None],
    make: Callable[[int], Case] = plain_case,
    heard: Callable[[int, Case, Any], None] = lambda *_: None,
) -> tuple[int, int, int]:
    """Audit random networks; count networks, those with a false claim, and those with a miss.

    Args:
        seeds: of the networks.
        report: told the seed and a line on everything that is worth one.
        make: makes a case from a seed.
        heard: told the seed, the case and the audit of every case that was audited.
    """
    networks = false = missed = 0
    for seed in seeds:
        case = make(seed)
        try:
            verdicts = verdicts_on(case, partial(heard, seed, case))
        except IllConditioned:
            report(seed, "nothing to compare: ill conditioned everywhere")
            continue
        networks += 1
        kinds = {kind for kind, _ in verdicts}
        false += "false" in kinds
        missed += "missed" in kinds
        for kind, words in verdicts:
            report(seed, f"{kind}: {words}")
    return networks, false, missed


def verdicts_on(case: Case, heard: Callable[[Any], None] = lambda _: None) -> list[Verdict]:
    """Audit a case and judge the audit; an audit that raises is wrong where the network runs."""
    from onsphere.symmetry import audit

    judge = Judge(case)
    try:
        found = audit(*given_to_audit(case))
    except Exception as error:
        said = f"the audit raised {type(error).__name__}: {str(error).splitlines()[0]}"
        return [("note" if _unusable(case) else "false", said)]
    heard(found)
    return judged(case, found, judge)


def given_to_audit(case: Case) -> tuple[nn.Module, tuple[Any, ...]]:
    """The network and its inputs as the audit is given them."""
    if not case.short:
        return case.net, case.args
    args = (t.float() if t.is_floating_point() else t for t in case.args)
    return deepcopy(case.net).float(), tuple(args)


def _unusable(case: Case) -> bool:
    """Whether a network gives no numbers on the inputs that the audit has."""
    try:
        Judge(Case(case.net, case.args, (), case.rough))
    except IllConditioned:
        return True
    return False


def judged(case: Case, found: Any, judge: Judge | None = None) -> list[Verdict]:
    """Judge an audit, or anything with the fields of one."""
    judge = judge or Judge(case)
    said = judge.false(found)
    verdicts: list[Verdict] = [("false", words) for words in said]
    if said and found.unreached:
        # What is claimed while some weights were never reached holds where they are not reached.
        verdicts = [("note", words) for words in said]
        verdicts += [("false", words) for words in _at_home(case, found)]
    claims = [*found.scale_symmetries, *({n: 1} for n in found.inert)]
    listed = getattr(found, "limits", [])
    more, undecided = missed(case, claims, found.unreached, judge)
    for v in more:
        limits = [
            x.kind for x in listed
            if x.kind not in ("buffers", "effect") or v.keys() & set(x.names)
        ]  # fmt: skip
        kind, said = ("note", f"limit {limits}: ") if limits else ("missed", "")
        verdicts.append((kind, f"{said}{shown(v)} is a symmetry, and not claimed"))
    if undecided:
        verdicts.append(("note", "some direction stayed undecided"))
    return verdicts


def _at_home(case: Case, found: Any) -> list[str]:
    """Claims that fail on the inputs that the audit was given, where they reach no more weights."""
    try:
        home = Judge(Case(case.net, case.args, (), case.rough))
    except IllConditioned:
        return []
    home.places = [p for p in home.places if all(_rests(home, p, n) for n in found.unreached)]
    return home.false(found) if home.places else []


def _rests(judge: Judge, place: Place, name: str) -> bool:
    """Whether other values of a weight change nothing at one place."""
    state = replacing(name)(place.state, random.Random(0))
    return change(place.outputs, place.after(judge.net, state)) <= judge.tolerance


def missed(
    case: Case,
    claims: Iterable[Mapping[str, Any]],
    without: Iterable[str] = (),
    judge: Judge | None = None,
) -> tuple[list[Symmetry], bool]:
    """Symmetries outside the span of claims, each tried at fresh weights too.

    Returns:
        The symmetries, and whether some direction stayed undecided.
    """
    search = Search(judge or Judge(case), claims, without)
    more = search.found()
    if not more:
        return [], search.undecided
    judges = []
    for seed in (1007, 2007, 3007, 4007):  # a very weak dependence shows at few weights
        try:
            judges.append(Judge(case, seed=seed))
        except IllConditioned:
            break
    if not judges:
        return more, search.undecided
    kept = [v for v in more if all(j.holds(v) and j.shows(v) for j in judges)]
    undecided, fresh = search.undecided or len(kept) < len(more), judges[0]
    # An expert that no input of the oracle's reaches shows nothing.
    silent = [v for v in kept if any(_asleep(fresh, n) for n in v if ".e." in n)]
    return [v for v in kept if v not in silent], undecided or bool(silent)


def _asleep(judge: Judge, name: str) -> bool:
    """Whether other values of a weight change nothing at any place of a judge."""
    return judge.changed_by(replacing(name)) <= judge.tolerance


def numeric_dimension(case: Case) -> int:
    """How many independent scale symmetries the parameters of a case have, by rescales."""
    return len(missed(case, [])[0])


def change_under(case: Case, symmetry: Mapping[str, Any]) -> float:
    """Largest relative change of the outputs under a scale symmetry."""
    return Judge(case).changed_by(scaling(symmetry))


__all__ = ["change_under", "count_wrong", "evaluate", "judged", "missed", "numeric_dimension"]
