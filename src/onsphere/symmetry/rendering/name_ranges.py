"""Names of weights that differ in numbers only, folded into one: ``layers.0-31.q_proj.weight``.

A name is a mask (``layers.#.q_proj.weight``) and the numbers in it. A set of names with one mask is
a set of points, written as few boxes as a greedy merge finds. A list of scale symmetries is folded
twice: within each, and then across all that look alike, where names may run apart by a constant
(``layers.i.norm`` with ``layers.i+1.q_proj``).
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

Point = tuple[int, ...]
Box = tuple[tuple[int, ...], ...]
"""For each place the sorted numbers that stand there; a box holds all combinations."""

_NUMBER = re.compile(r"(?:(?<=[.\s(])|^)\d+(?=\.)|(?:(?<=\.)|^)\d+$")
_LETTERS = "ijkl"
_PLACE = "\0"
"""Where a number stood; no name holds it."""


def folded(names: Iterable[str]) -> list[str]:
    """Write a set of names with as few as can be.

    Example:
        >>> folded(["layers.0.q", "layers.1.q", "norm", "layers.3.q"])
        ['layers.{0-1,3}.q', 'norm']
        >>> folded([f"stages.{s}.layers.{n}.conv" for s in range(2) for n in range(3)])
        ['stages.0-1.layers.0-2.conv']
    """
    points: dict[str, list[Point]] = {}
    for name in dict.fromkeys(names):
        points.setdefault(_NUMBER.sub(_PLACE, name), []).append(_numbers(name))
    return [
        _filled(mask, [ranges(side) for side in box])
        for mask, found in points.items()
        for box in boxes(found)
    ]


def folded_symmetries(symmetries: Sequence[Mapping[str, Fraction]]) -> list[str]:
    """Write rescalings as products with a scale ``a``, those that look alike as one.

    Example:
        >>> pairs = [{f"h.{n}.q": Fraction(1), f"h.{n}.k": Fraction(-1)} for n in range(12)]
        >>> folded_symmetries(pairs)
        ['h.0-11: q * a, k / a']
        >>> chain = [{f"h.{n}.v": Fraction(2), f"h.{n + 1}.q": Fraction(-1)} for n in range(3)]
        >>> folded_symmetries(chain)
        ['h: i.v * a^2, i+1.q / a (i = 0-2)']
    """
    alike: dict[Hashable, list[list[_Term]]] = {}
    for symmetry in symmetries:
        terms = _terms(symmetry)
        alike.setdefault(tuple((t.mask, t.exponent) for t in terms), []).append(terms)
    return [line for group in alike.values() for line in _lines(group, _factor)]


def folded_sets(sets: Sequence[Iterable[str]]) -> list[str]:
    """Write sets of expressions in names, those that look alike as one.

    Example:
        >>> folded_sets([[f"h.{n}.k + v", f"h.{n}.o - h.{n}.w @ v"] for n in range(12)])
        ['h.0-11: k + v, o - w @ v']
    """
    alike: dict[Hashable, list[list[_Term]]] = {}
    for some in sets:
        terms = _terms(dict.fromkeys(some, Fraction(1)))
        alike.setdefault(tuple(t.mask for t in terms), []).append(terms)
    return [line for group in alike.values() for line in _lines(group, lambda _: "")]


def boxes(points: Sequence[Point]) -> list[Box]:
    """Merge points into boxes, greedily from the last place to the first.

    Example:
        >>> boxes([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)])
        [((0, 1), (0, 1)), ((2,), (0,))]
    """
    found: list[Box] = [tuple((n,) for n in p) for p in dict.fromkeys(points)]
    for place in reversed(range(len(points[0]))):
        merged: dict[Box, set[int]] = {}
        for box in found:
            merged.setdefault(box[:place] + box[place + 1 :], set()).update(box[place])
        found = [(*b[:place], tuple(sorted(side)), *b[place:]) for b, side in merged.items()]
    return found


def ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as ranges.

    Example:
        >>> ranges([0, 1, 2]), ranges([4]), ranges([0, 2, 3])
        ('0-2', '4', '{0,2-3}')
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
    return f"{{{text}}}" if len(runs) > 1 else text


@dataclass(frozen=True)
class _Term:
    """Weights that a symmetry scales alike: numbers that differ are already part of the mask."""

    mask: str
    numbers: Point
    exponent: Fraction


def _terms(symmetry: Mapping[str, Fraction]) -> list[_Term]:
    points: dict[tuple[str, Fraction], list[Point]] = {}
    for name, exponent in symmetry.items():
        points.setdefault((_NUMBER.sub(_PLACE, name), exponent), []).append(_numbers(name))
    terms = []
    for (mask, exponent), found in points.items():
        for box in boxes(found):
            texts = [ranges(side) if len(side) > 1 else _PLACE for side in box]
            single = tuple(side[0] for side in box if len(side) == 1)
            terms.append(_Term(_filled(mask, texts), single, exponent))
    return terms


def _lines(group: Sequence[Sequence[_Term]], factor: Callable[[Fraction], str]) -> list[str]:
    """Fold symmetries with the same masks and exponents."""
    rows = [[n for term in terms for n in term.numbers] for terms in group]
    links = _links(rows, len(group[0][0].numbers))
    free = sorted({leader for leader, _ in links if leader is not None})
    apart: dict[Point, list[Point]] = {}
    for row in rows:
        rest = tuple(n for n, (leader, _) in zip(row, links, strict=True) if leader is None)
        apart.setdefault(rest, []).append(tuple(row[f] for f in free))
    lines = []
    for rest, points in apart.items():
        sides = [dict(zip(free, box, strict=True)) for box in boxes(points)]
        lines += [_line(group[0], links, s, rest, factor) for s in sides]
    return lines


def _links(rows: Sequence[Sequence[int]], leading: int) -> list[tuple[int | None, int]]:
    """Say for every column which column of the first name it follows, and at what distance."""
    columns = list(zip(*rows, strict=True))
    links: list[tuple[int | None, int]] = []
    for i, column in enumerate(columns):
        if i < leading:
            links.append((i, 0))
            continue
        found = [
            (leader, gaps.pop())
            for leader in range(leading)
            if len(gaps := {a - b for a, b in zip(column, columns[leader], strict=True)}) == 1
            and len(set(columns[leader])) > 1
        ]
        links.append(min(found, key=lambda link: abs(link[1]), default=(None, 0)))
    return links


def _line(
    terms: Sequence[_Term],
    links: Sequence[tuple[int | None, int]],
    sides: Mapping[int, Sequence[int]],
    rest: Point,
    factor: Callable[[Fraction], str],
) -> str:
    apart = {
        leader for leader, gap in links if leader is not None and gap and len(sides[leader]) > 1
    }
    letters = {leader: _LETTERS[i % 4] for i, leader in enumerate(sorted(apart))}
    others = iter(rest)
    texts = []
    for leader, gap in links:
        if leader is None:
            texts.append(str(next(others)))
        elif leader in letters:
            texts.append(letters[leader] + (f"{gap:+d}" if gap else ""))
        else:
            texts.append(ranges([n + gap for n in sides[leader]]))
    found = iter(texts)
    names = [_filled(t.mask, [next(found) for _ in t.numbers]) for t in terms]
    where = ", ".join(f"{letters[x]} = {ranges(sides[x])}" for x in sorted(apart))
    written = _with_common_start(names, [factor(t.exponent) for t in terms])
    return f"{written} ({where})" if where else written


def _with_common_start(names: Sequence[str], factors: Sequence[str]) -> str:
    """Write names with their factors; what all names begin with comes first, once."""
    split = [name.split(".") for name in names]
    length = 0
    while len(names) > 1 and all(
        len(s) > length + 1 and s[length] == split[0][length] for s in split
    ):
        length += 1
    start = ".".join(split[0][:length])
    rest = [".".join(s[length:]).replace(f" {start}.", " ") for s in split]
    body = ", ".join(f"{n}{f}" for n, f in zip(rest, factors, strict=True))
    return f"{start}: {body}" if start else body


def _factor(exponent: Fraction) -> str:
    size = abs(exponent)
    power = "" if size == 1 else f"^{size}" if size.denominator == 1 else f"^({size})"
    return f" {'*' if exponent > 0 else '/'} a{power}"


def _numbers(name: str) -> Point:
    return tuple(int(n) for n in _NUMBER.findall(name))


def _filled(mask: str, texts: Sequence[str]) -> str:
    rest = iter(texts)
    return re.sub(_PLACE, lambda _: next(rest), mask)
