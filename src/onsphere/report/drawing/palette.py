"""Colours and markers that mean the same thing everywhere in a document."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from onsphere.report.document import Figure, Series


@dataclass(frozen=True)
class Look:
    """How one key looks: a colour and, for those who see few colours or print grey, a marker."""

    color: str
    marker: str


# Chosen so that every two of a table differ by at least 20 units of CIE L*a*b* for people with any
# of the three dichromacies, and none fades into white (tests/report/test_palette.py measures it).
METHODS = {
    "none": Look("#555555", "o"),
    "BN": Look("#410da9", "s"),
    "LN": Look("#f27d7d", "D"),
    "IN": Look("#12869f", "^"),
    "GN": Look("#0d550d", "v"),
    "RMS": Look("#4d145c", "P"),
    "WN": Look("#d4a91a", "X"),
    "CWN": Look("#0dc6f2", "<"),
    "SN": Look("#9f58e1", ">"),
}

VARIANTS = {
    "plain": Look("#0d67c1", "o"),
    "sphere": Look("#cf370d", "s"),
    "decay": Look("#35bd8b", "D"),
    "predicted": Look("#161616", "^"),
    "measured": Look("#943a6a", "o"),
}

_KNOWN = METHODS | VARIANTS
# What other keys are given: every colour but the ink of predictions.
_SPARE = tuple(
    look.color for key, look in (VARIANTS | METHODS).items() if key not in {"predicted", "none"}
)
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")


def key_of(series: Series) -> str:
    """Return the key that decides the colour of a series.

    Example:
        >>> key_of(Series("BN, decay", [0], [1], color="BN"))
        'BN'
    """
    return series.label if series.color is None else series.color


@dataclass(frozen=True)
class Palette:
    """The look of every key of one document.

    Args:
        looks: key to look; methods and variants need no entry.
    """

    looks: dict[str, Look] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Look:
        """Return the look of ``key``; a key never seen before looks grey."""
        return _KNOWN.get(key) or self.looks.get(key) or METHODS["none"]


def palette_of(figures: Iterable[Figure]) -> Palette:
    """Give every key of some figures its look.

    Methods and variants always have their own. Other keys take, in order of appearance, a colour
    that nothing else has; when there is none left, one that nothing in the same figures has; and
    after that colours come again with other markers.

    Args:
        figures: all the figures of a document.

    Returns:
        The palette. Equal figures in equal order give an equal palette.

    Example:
        >>> from onsphere.report.document import Panel
        >>> lines = [Series("BN", [0], [1]), Series("PGD", [0], [1])]
        >>> palette = palette_of([Figure("f", "", "", [Panel("", "x", "y", lines)])])
        >>> palette["BN"].color, palette["PGD"].color
        ('#410da9', '#0d67c1')
    """
    shown = [dict.fromkeys(key_of(s) for p in f.panels for s in p.series) for f in figures]
    keys = dict.fromkeys(key for together in shown for key in together)
    looks = {key: _KNOWN[key] for key in keys if key in _KNOWN}
    for key in keys:
        if key not in looks:
            beside = {k for together in shown if key in together for k in together}
            near = {looks[k].color for k in beside if k in looks}
            looks[key] = _spare_look(looks.values(), near)
    return Palette(looks)


def _spare_look(used: Collection[Look], near: set[str]) -> Look:
    """Choose a colour no key has; else one that no key of the same figures has; else the rarest."""
    colors, times = {look.color for look in used}, Counter(look.color for look in used)
    choices = [c for c in _SPARE if c not in colors] or [c for c in _SPARE if c not in near]
    color = choices[0] if choices else min(_SPARE, key=lambda c: times[c])
    markers = Counter(look.marker for look in used if look.color == color or color not in colors)
    return Look(color, min(_MARKERS, key=lambda m: markers[m]))
