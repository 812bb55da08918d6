"""An audit as text: alike layers share a line, so that a deep model fits on a screen."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from textwrap import wrap

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes
from onsphere.symmetry.claims import (
    Family,
    Kind,
    ScaleInvariance,
    ShiftFamily,
    ShiftMove,
    Slices,
)
from onsphere.symmetry.rendering import advice
from onsphere.symmetry.rendering.name_ranges import (
    folded,
    folded_sets,
    folded_symmetries,
)
from onsphere.symmetry.result import AuditResult
from onsphere.symmetry.search.partial import Part

WIDTH = 100
_FEW_RUNS = 3
"""Up to how many runs of places are told one by one."""

MODES = {"train": "training", "eval": "evaluation"}

_DECAYS = {
    (Kind.SPHERE, Kind.SHARED): "sets learning rates and penalizes nothing, on",
    (Kind.TRADED,): "penalizes products of weights and balances them, on",
    (Kind.FIXED,): "penalizes the scale itself, which is part of the function, on",
    (Kind.TIED,): (
        "penalizes the scale itself (only frozen weights or buffers could make up for it), on"
    ),
    (Kind.PARTLY,): (
        "penalizes the scale of one part, while others trade, turn or have no effect, on"
    ),
    (Kind.UNKNOWN,): (
        "has effects that are not known, as not all that the model does was followed, on"
    ),
    (Kind.FROZEN,): "does nothing, as these are frozen, to",
}


def headline(audit: AuditResult) -> str:
    """Return in one line what an audit found."""
    weights, trades = len(audit.parameters), len(audit.rescalings)
    return (
        f"{audit.model} in {MODES[audit.mode]} mode: {weights} weight{'s' * (weights != 1)}, "
        f"{len(audit.own_spheres())} on spheres of their own, {trades} rescaling "
        f"{'symmetry' if trades == 1 else 'symmetries'}, {len(audit.inert)} inert"
    )


def rendered(audit: AuditResult) -> str:
    """Return the audit as a table for a terminal: plain text, at most 100 columns."""
    entries, found = sum(map(size, audit.parameters.values())), len(audit.scale_symmetries)
    parts = [
        f"{audit.model} in {MODES[audit.mode]} mode: {counted(len(audit.parameters), 'weight')} "
        f"with {entries:,} entries, {found} scale {'symmetry' if found == 1 else 'symmetries'}"
        + (f"\n({audit.note})" if audit.note else ""),
        *(line for said in advice.on_mode(audit) for line in ["", *wrap(said, WIDTH)]),
        *_section("SCALE-INVARIANT, on a sphere of its own: only the direction counts",
                  len(audit.own_spheres()), sphere_lines(audit)),
        *_section("PARTLY SCALE-INVARIANT: each part can be scaled alone", _count(audit, "sphere"),
                  part_lines(audit, "sphere")),
        *_section("SCALE-INVARIANT TOGETHER, on a joint sphere: "
                  "scaling all of these at once changes nothing",
                  len(joint_spheres(audit, buffers=False)), joint_lines(audit, buffers=False)),
        *_section("SCALE-INVARIANT TOGETHER WITH BUFFERS, which do not train: "
                  "scaling all at once changes nothing",
                  len(joint_spheres(audit, buffers=True)), joint_lines(audit, buffers=True)),
        *_section("RESCALING SYMMETRIES: for any a > 0 this changes nothing",
                  len(audit.rescalings), trade_lines(audit)),
        *_section("RESCALING BY CHANNEL: each channel by an a > 0 of its own changes nothing",
                  len(traded_families(audit)), family_lines(audit)),
        *_section("SHIFT SYMMETRIES: adding such an amount to all entries changes nothing",
                  len(audit.shifts), shift_lines(audit)),
        *_section("SHIFT FAMILIES: adding such amounts at once changes nothing, for any v",
                  len(joint_shifts(audit)), joint_shift_lines(audit)),
        *_section("INERT: no effect on the output", len(audit.inert), folded(audit.inert)),
        *_section("PARTLY INERT: these parts have no effect", _count(audit, "inert"),
                  part_lines(audit, "inert")),
        *_section("NOT REACHED by this input: nothing is claimed", len(audit.unreached),
                  folded(audit.unreached)),
        *_decay(audit),
        *_certificate(audit),
        *_section("INPUTS", 0, [f"- {line}" for line in audit.conditions]),
        *_section("WHAT TO DO", 0, [f"- {line}" for line in advice.of_model(audit)
                                      if line not in advice.on_mode(audit)]),
    ]  # fmt: skip
    return "\n".join(parts)


def sphere_lines(audit: AuditResult) -> list[str]:
    """Return the weights on spheres of their own, with their granularity."""
    by_words: dict[str, list[str]] = {}
    for name, sphere in audit.own_spheres().items():
        words = sphere.granularity + ("" if sphere.tangent else ", which gradients do not know")
        by_words.setdefault(words, []).append(name)
    return [f"{line}: {words}" for words, names in by_words.items() for line in folded(names)]


def part_lines(audit: AuditResult, kind: str) -> list[str]:
    """Return the weights of which only a part is on spheres, or only a part is inert."""
    by_words: dict[str, list[str]] = {}
    for part in audit.parts:
        if part.kind == kind:
            by_words.setdefault(_part_words(part), []).append(part.name)
    return [f"{line}: {words}" for words, names in by_words.items() for line in folded(names)]


def _part_words(part: "Part") -> str:
    (start, stop), count = part.intervals[0], len(part.intervals)
    last = part.intervals[-1][1]
    if count == 1:
        return f"entries {start} to {stop - 1} of axis {part.axis}"
    return f"{count} parts of axis {part.axis}, from {start} to {last - 1}"


def _count(audit: AuditResult, kind: str) -> int:
    return sum(part.kind == kind for part in audit.parts)


def joint_spheres(audit: AuditResult, *, buffers: bool) -> list[ScaleInvariance]:
    """Return the joint spheres that buffers are part of, or those that they are not."""
    alone = {s.names for s in audit.own_spheres().values()}
    return [
        s for s in audit.spheres
        if s.names not in alone and (s.exponents.keys() <= audit.parameters.keys()) is not buffers
    ]  # fmt: skip


def joint_lines(audit: AuditResult, *, buffers: bool) -> list[str]:
    """Return the sets of weights, or of weights and buffers, that share one sphere."""
    by_words: dict[str, list[Mapping[str, Fraction]]] = {}
    for sphere in joint_spheres(audit, buffers=buffers):
        by_words.setdefault(sphere.granularity, []).append(sphere.exponents)
    return [
        re.sub(r" \* a(?=,|$|\))", "", line) + ("" if words == "whole tensor" else f": {words}")
        for words, found in by_words.items()
        for line in folded_symmetries(found)
    ]


def trade_lines(audit: AuditResult) -> list[str]:
    """Return the rescalings, as products with a scale ``a``."""
    return _folded(audit, [r.exponents for r in audit.rescalings])


def traded_families(audit: AuditResult) -> list[Family]:
    """Return the families that move slices of several weights, or not all slices of one."""
    return [f for f in audit.families if len(f.slices) > 1 or _range(f.slices[0], audit.parameters)]


def family_lines(audit: AuditResult) -> list[str]:
    """Return the families, one line for alike layers of any width."""
    by_count: dict[tuple[int, bool], list[dict[str, Fraction]]] = {}
    for family in traded_families(audit):
        terms: dict[str, Fraction] = {}
        for s in family.slices:
            if s.name in audit.parameters:
                words = _axis_words(
                    s, audit.parameters[s.name], family.count == 1, s.name in audit.transposed
                )
                what = f"{s.name}{words}{_range(s, audit.parameters)}"
                if what in terms:  # another part of the same weight, alike in words
                    what += f" ({len([w for w in terms if w.startswith(what)]) + 1})"
                terms[what] = s.exponent
        buffers = any(s.name not in audit.parameters for s in family.slices)
        by_count.setdefault((family.count, buffers), []).append(terms)
    return [
        f"{line}{', and buffers with it' if buffers else ''}"
        f"{f', for each of {count}' if count > 1 else ', all by one number'}"
        for (count, buffers), found in by_count.items()
        for line in folded_symmetries(found)
    ]


def _axis_words(slices: Slices, shape: Sequence[int], alone: bool, transposed: bool) -> str:
    """Say what is scaled: rows, columns, filters, entries; several of them belong to a channel.

    Those of a family of one channel move together, whether it is a whole weight or a part of it.
    """
    per = slices.index.shape[1]
    if per == size([shape[a] for a in slices.axes]):
        return ""
    if len(slices.axes) > 1:
        return f" {_words_of_two_axes(slices, shape, transposed)}"
    axis = slices.axes[0]
    if len(shape) == 1 or size(shape) == shape[axis]:
        words = "entries"
    elif len(shape) == 2:
        words = ("rows", "columns")[axis]
    elif axis < 2:
        words = ("filters", "channels")[axis ^ transposed]
    else:
        words = f"slices of axis {axis}"
    if alone:
        return f" {words}"
    groups = {1: words, 2: f"pairs of {words}"}.get(per, f"groups of {per} {words}")
    return f" {groups}{_spread(slices.index)}"


def _spread(index: Tensor) -> str:
    """Say which places belong to one channel, where these are not neighbours."""
    places = index.sort(1).values
    steps = _distinct(places.diff(dim=1))
    if len(steps) == 1:
        return "" if int(steps) == 1 else f" ({int(steps)} apart)"
    first = places[places[:, 0].argmin()].tolist() if len(steps) else []
    return f" (as {', '.join(map(str, first[:4]))}{', ...' * (len(first) > 4)})" if first else ""


def _words_of_two_axes(slices: Slices, shape: Sequence[int], transposed: bool) -> str:
    """Say the same of slices along two axes: of stacked matrices, or of a grouped convolution."""
    per = slices.index.shape[1]
    if len(slices.axes) == len(shape):
        return "entries" if per == 1 else f"groups of {per} entries"
    if len(shape) == 3 and min(shape[1:]) > 1 and slices.axes[0] == 0:
        words, length = ("rows", "columns")[slices.axes[1] - 1], shape[slices.axes[1]]
        matrices, places = slices.index // length, _distinct(slices.index % length)
        if bool((matrices == matrices[:, :1]).all()) and per == length:
            return "matrices"
        if len(places) < length:
            words += f" {int(places[0])} to {int(places[-1])}"
        first, last = int(matrices.min()), int(matrices.max())
        if first == last and shape[0] > 1:
            return f"{words} of matrix {first}"
        if per == 1 and len(_distinct(matrices)) == shape[0]:
            return f"{words} of each matrix"
        if per == 1:
            return f"{words} of matrices {first} to {last}"
        if per == shape[0] and bool((matrices.sort(1).values.diff() == 1).all()):
            return f"{words} of all matrices"
    return "filters of its groups" if transposed else "channels of its groups"


def _range(slices: Slices, parameters: Mapping[str, Sequence[int]]) -> str:
    """Say between which places slices lie, if not all of them belong to a family."""
    shape = parameters.get(slices.name)
    if (
        shape is None
        or len(slices.axes) > 1
        or size([shape[a] for a in slices.axes]) in (slices.index.numel(), slices.index.shape[1])
    ):
        return ""
    runs = _runs(slices.index)
    if 1 < len(runs) <= _FEW_RUNS:
        return " " + " and ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in runs)
    parts = f" in {len(runs)} parts" if runs[1:] else ""
    return f" {int(slices.index.min())} to {int(slices.index.max())}{parts}"


def _distinct(numbers: Tensor) -> Tensor:
    """Return all numbers that occur, in their order."""
    return torch.bincount(numbers.flatten()).nonzero().flatten()


def _runs(index: Tensor) -> list[tuple[int, int]]:
    """Return the first and the last of each run of places."""
    places = index.flatten().sort().values
    starts = [0, *((places[1:] - places[:-1] > 1).nonzero().flatten() + 1).tolist(), len(places)]
    return [(int(places[a]), int(places[b - 1])) for a, b in pairwise(starts)]


def shift_lines(audit: AuditResult) -> list[str]:
    """Return the weights that can move, with the amounts that do nothing."""
    by_words: dict[str, list[str]] = {}
    for shift in audit.shifts:
        words = _shift_words(shift.axes, len(audit.parameters[shift.name]))
        by_words.setdefault(words, []).append(shift.name)
    return [f"{line}: {words}" for words, names in by_words.items() for line in folded(names)]


def joint_shifts(audit: AuditResult) -> list[ShiftFamily]:
    """Return the families of shifts that are not listed as shifts of one weight, or as inert."""
    told = {s.name for s in audit.shifts} | set(audit.inert)
    told |= {p.name for p in audit.parts if p.kind == "inert"}
    return [f for f in audit.shift_families if len(f.moves) > 1 or f.names[0] not in told]


def joint_shift_lines(audit: AuditResult) -> list[str]:
    """Return the families of shifts, one line for alike layers of any width."""
    by_count: dict[str, list[list[str]]] = {}
    for family in joint_shifts(audit):
        words = [_move_words(m, family, audit.parameters.get(m.name, ())) for m in family.moves]
        numbers = "a number" if family.dimension == 1 else f"{family.dimension} numbers"
        by_count.setdefault(numbers, []).append(words)
    return [
        f"{line} (v: {numbers})"
        for numbers, found in by_count.items()
        for line in folded_sets(found)
    ]


def _move_words(move: ShiftMove, family: ShiftFamily, shape: Sequence[int]) -> str:
    """Say what is added to one weight."""
    size = abs(move.factor)
    what = move.map or "v"
    if move.free:
        one = ("column" if move.free == (0,) else "row") if len(shape) == 2 else "filter"
        one = one if 0 not in move.free or len(shape) == 2 else "slice"
        what += f" in every {one}" + (" of a group" if family.count > 1 else "")
    elif (
        not move.map
        and move.places.numel() > family.count > 1
        and not bool((move.places < 0).any())
    ):
        what += " by group"
    taken = (move.places >= 0).reshape(-1).nonzero().reshape(-1)
    where = ""
    if len(taken) < move.places.numel():
        first, last = int(taken[0]), int(taken[-1])
        run = last - first + 1 == len(taken) and move.places.ndim == 1
        where = f" {first} to {last}" if run else " in part"
    times = "" if size == 1 else f"{size if size.denominator < 1000 else f'{float(size):.4g}'} "
    return f"{move.name}{where} {'-' if move.factor < 0 else '+'} {times}{what}"


def leak_lines(audit: AuditResult) -> list[str]:
    """Return the symmetries in which eps takes part."""
    return _folded(audit, [x.exponents for x in advice.large_leaks(audit)])


def _folded(audit: AuditResult, symmetries: Iterable[Mapping[str, Fraction]]) -> list[str]:
    """Write symmetries by their weights; buffers (running statistics) move along unnamed."""
    found: dict[bool, list[dict[str, Fraction]]] = {False: [], True: []}
    for symmetry in symmetries:
        of_weights = {n: e for n, e in symmetry.items() if n in audit.parameters}
        found[len(of_weights) < len(symmetry)].append(of_weights)
    alone, along = (folded_symmetries(found[has_buffers]) for has_buffers in (False, True))
    return [*alone, *(f"{line}, and buffers with it" for line in along)]


def _decay(audit: AuditResult) -> list[str]:
    lines = []
    for kinds, words in _DECAYS.items():
        names = [n for n in audit.parameters if audit.kinds[n] in kinds]
        if names:
            found = folded(names)
            few = (
                found if len(found) <= 7 else [*found[:6], f"and {len(found) - 6} more like these"]
            )
            shown = ", ".join(few)
            lines.append(f"{words} {counted(len(names), 'weight')}: {shown}")
    return _section("WEIGHT DECAY", 0, lines)


def _certificate(audit: AuditResult) -> list[str]:
    if not audit.certified:
        exact = advice.exactness(audit)
        said = "by the operations that the model runs; not certified on numbers."
        return ["", *wrap(f"{exact[0].upper()}{exact[1:]}, {said}", WIDTH)]
    residuals = [s.residual for s in audit.spheres] + [r.residual for r in audit.rescalings]
    measured = [r for r in residuals if r is not None]
    derivative = (
        ": the derivative along every scale symmetry is 0 up to rounding (relative size at most "
        f"{max(measured):.0e})"
        if measured
        else ""
    )
    claimed = (audit.scale_symmetries, audit.families, audit.shifts, audit.shift_families)
    if not any((*claimed, audit.parts, audit.inert)):
        return []
    said = f"Certified by runs in float64 with eps near 0{derivative}."
    if audit.leaks:
        leak = max(x.amount for x in audit.leaks)
        said += (
            " At the model's own eps, scaling by e = 2.718 along one changes the output by at most "
            f"{leak:.0e} of its size."
        )
    return ["", *wrap(said, WIDTH)]


def _section(title: str, count: int, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    if not lines:
        return []
    counted = f" ({count})" if count else ""
    return ["", title + counted, *(w for line in lines for w in _wrapped(line))]


def _wrapped(line: str) -> list[str]:
    lines = wrap(
        re.sub(r" ([*/]) a", "\u00a0\\1\u00a0a", line), WIDTH, initial_indent="  ",
        subsequent_indent="      ", break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [line.replace("\u00a0", " ") for line in lines]


def counted(count: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def size(shape: Sequence[int]) -> int:
    """Return how many entries a tensor of this shape has."""
    size = 1
    for n in shape:
        size *= n
    return size


def _shift_words(axes: VectorAxes, ndim: int) -> str:
    if axes.pieces:
        axis, count = axes.pieces[0]
        return f"one amount for each of {count} blocks of axis {axis}"
    if not axes.index:
        return "one amount"
    if axes.index == (0,):
        return "one amount per row" if ndim == 2 else "one amount per filter"
    if ndim == 2:
        return "one amount per column"
    return f"one amount per entry of axes {', '.join(map(str, axes.index))}"
