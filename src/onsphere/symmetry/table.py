"""An audit as text: alike layers share a line, so that a deep model fits on a screen."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from onsphere.geometry import VectorAxes

if TYPE_CHECKING:
    from onsphere.symmetry.audit import Audit


def rendered(audit: "Audit") -> str:
    """Return the audit as a table for a terminal."""
    spheres = [s for s in audit.spheres if len(s.names) == 1]
    joint = [s for s in audit.spheres if len(s.names) > 1]
    parts = [
        f"{audit.model} ({audit.mode}): {len(audit.parameters)} parameters, "
        f"{len(audit.scale_symmetries)} scale symmetries",
        *_section("on a sphere", [(s.names, s.granularity) for s in spheres]),
        *_section("share one sphere", [(_signed(s.exponents), s.granularity) for s in joint]),
        *_section("trade scales", [(_signed(r.exponents), "") for r in audit.rescalings]),
        *_section("can shift", [((s.name,), _shift_words(s.axes)) for s in audit.shifts]),
        *_section("inert: no effect on the output", [((n,), "") for n in audit.inert]),
        *_section("not reached by this input: no claim", [((n,), "") for n in audit.unreached]),
    ]
    if audit.unknown_ops:
        ops = sorted({u.name for u in audit.unknown_ops})
        parts.append(
            f"operations without a rule (nothing is claimed through them): {', '.join(ops)}"
        )
    if audit.leaks:
        worst = max(audit.leaks, key=lambda x: x.amount)
        parts.append(
            f"certified in float64; largest leak through eps {worst.amount:.1e} per e-fold "
            f"({next(iter(worst.exponents))})"
        )
    if not audit.certified:
        parts.append("not certified on numbers: the model was built without memory")
    elif not audit.complete:
        parts.append("the numeric search for further symmetries was cut short: the model is large")
    return "\n".join(parts)


def grouped(names: Sequence[tuple[str, ...]]) -> list[str]:
    """Join tuples of names that differ in numbers only.

    Example:
        >>> grouped([("layers.0.q.weight",), ("layers.1.q.weight",), ("norm.weight",)])
        ['layers.0-1.q.weight', 'norm.weight']
    """
    patterns: dict[str, list[tuple[int, ...]]] = {}
    for entry in names:
        joined = ", ".join(entry)
        numbers = tuple(int(n) for n in _all_numbers(joined))
        patterns.setdefault(_masked(joined), []).append(numbers)
    return [line for pattern, found in patterns.items() for line in _filled(pattern, found)]


_INDEX = re.compile(r"(?:(?<=\.)|(?<=^)|(?<= ))\d+(?=\.|,|$|\^)")
"""A whole component of a name that is a number."""


def _all_numbers(text: str) -> list[str]:
    return _INDEX.findall(text)


def _masked(text: str) -> str:
    return _INDEX.sub("#", text)


def _filled(pattern: str, found: list[tuple[int, ...]]) -> Iterable[str]:
    """Fill one pattern: positions that always agree share one range."""
    if len(found) == 1 or any(len(set(f)) > 1 for f in found):
        for numbers in found:
            yield _with(pattern, [str(n) for n in numbers])
        return
    yield _with(pattern, [_ranges([f[0] for f in found])] * len(found[0]))


def _with(pattern: str, numbers: Sequence[str]) -> str:
    rest = iter(numbers)
    return re.sub("#", lambda _: next(rest), pattern)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
    return f"{{{text}}}" if len(runs) > 1 else text


def _section(title: str, entries: Sequence[tuple[tuple[str, ...], str]]) -> list[str]:
    if not entries:
        return []
    by_words: dict[str, list[tuple[str, ...]]] = {}
    for names, words in entries:
        by_words.setdefault(words, []).append(names)
    lines = [f"  {_short(line)}{': ' + words if words else ''}"
             for words, names in by_words.items() for line in grouped(names)]  # fmt: skip
    return [f"{title} ({len(entries)}):", *lines]


def _short(line: str, limit: int = 8) -> str:
    names = line.split(", ")
    if len(names) <= limit:
        return line
    patterns = grouped([(n,) for n in names])
    shown = patterns if len(patterns) <= limit else [*patterns[:limit], f"... {len(names)} in all"]
    return ", ".join(shown)


def _signed(exponents: Mapping[str, Fraction]) -> tuple[str, ...]:
    return tuple(n if e == 1 else f"{n}^{e}" for n, e in exponents.items())


def _shift_words(axes: VectorAxes) -> str:
    pieces, index = axes.pieces, axes.index
    if pieces:
        return f"by a common amount within each of {pieces[0][1]} blocks of axis {pieces[0][0]}"
    return f"by a common amount for each entry of axes {index}" if index else "by one constant"
