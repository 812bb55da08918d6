"""Numbers as people read them: few digits, powers of ten, one grid of decimals down a column."""

import math
import unicodedata
from collections.abc import Sequence

from onsphere.report.document import Cell

MISSING = "–"
_THIN = "\u2009"
_MINUS = "\u2212"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Outside these magnitudes a float is written with a power of ten.
_SMALL, _LARGE = 1e-3, 1e6
# A column whose magnitudes differ by more than this has no common number of decimals.
_SPREAD = 100.0


def power(exponent: int) -> str:
    """Write a power of ten: ``10⁻³``.

    Example:
        >>> power(-3)
        '10⁻³'
    """
    return f"10{str(exponent).translate(_RAISED)}"


def number(cell: Cell, digits: int = 4) -> str:
    """Write one value for a reader.

    Args:
        cell: a number, a text (returned as it is), or ``None``.
        digits: significant digits kept of a float; one fewer beside a power of ten.

    Returns:
        Whole numbers in full with thin spaces between thousands from 10 000 on; floats rounded;
        very small and very large ones as ``1.2×10⁻¹⁴``; ``–`` for ``None`` and ``nan``; ``∞``.

    Example:
        >>> [number(v) for v in (0.98765, 1.2e-14, -3, None, float("nan"), float("inf"))]
        ['0.9877', '1.2×10⁻¹⁴', '−3', '–', '–', '∞']
    """
    if cell is None or isinstance(cell, str):
        return MISSING if cell is None else cell
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if math.isnan(cell):
        return MISSING
    sign = _MINUS if cell < 0 else ""
    return sign + _magnitude(abs(cell), digits)


def column(cells: Sequence[Cell]) -> list[str]:
    """Write the cells of one column, with as many decimals in each number as its neighbours have.

    Args:
        cells: numbers, texts and missing values in any mixture.

    Returns:
        One text per cell. Floats of similar magnitude share a number of decimals; an exact zero
        is ``0`` so that it cannot be mistaken for something rounded.

    Example:
        >>> column([0.98, 0.9, 0.1234, 0.0])
        ['0.9800', '0.9000', '0.1234', '0']
    """
    floats = [abs(c) for c in cells if isinstance(c, float) and math.isfinite(c) and c != 0]
    if not floats or any(_needs_power(v, 4) for v in floats) or max(floats) > _SPREAD * min(floats):
        return [number(c) for c in cells]
    top = max(floats)
    if any(round(v, _places(top)) != round(v, _places(top) + 9) for v in floats):
        places = _places(top)
    else:
        places = max(_needed(v, _places(top)) for v in floats)
    return [_fixed(c, places) if _plain(c) else number(c) for c in cells]


def is_numeric(cells: Sequence[Cell]) -> bool:
    """Say whether a column holds numbers and nothing else but gaps.

    Example:
        >>> is_numeric([1, None, 2.5]), is_numeric([1, "BN"]), is_numeric([None])
        (True, False, False)
    """
    given = [c for c in cells if c is not None]
    return bool(given) and not any(isinstance(c, str) for c in given)


def _magnitude(value: float, digits: int) -> str:
    if math.isinf(value):
        return "∞"
    if isinstance(value, int) and value < 10**12:
        return _thousands(str(value))
    if value == 0:
        return "0"
    if _needs_power(value, digits):
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return power(int(exponent)) if mantissa == "1" else f"{mantissa}×{power(int(exponent))}"
    rounded = f"{value:.{_places(value, digits)}f}"
    return _thousands(rounded.rstrip("0").rstrip(".") if "." in rounded else rounded)


def _needs_power(value: float, digits: int) -> bool:
    # 999999.7 rounds to a million, 0.00099999 to a thousandth: ask the rounded value.
    return not _SMALL <= float(f"{value:.{digits - 1}e}") < _LARGE


def _places(value: float, digits: int = 4) -> int:
    """Count the decimals that show ``digits`` significant digits of ``value``."""
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    return max(digits - 1 - exponent, 0)


def _needed(value: float, places: int) -> int:
    """Count the decimals, at most ``places``, after which only zeros follow."""
    text = f"{value:.{places}f}"
    return len(text.partition(".")[2].rstrip("0"))


def _plain(cell: Cell) -> bool:
    return isinstance(cell, float) and math.isfinite(cell) and cell != 0


def _fixed(cell: Cell, places: int) -> str:
    assert isinstance(cell, float)
    return (_MINUS if cell < 0 else "") + _thousands(f"{abs(cell):.{places}f}")


def _thousands(text: str) -> str:
    whole, point, rest = text.partition(".")
    if len(whole) > 4:
        whole = f"{int(whole):,}".replace(",", _THIN)
    return whole + point + rest


_NONCHARACTERS = 0xFFFE


def clean(text: str) -> str:
    r"""Replace what cannot be shown by spaces: control characters, lone surrogates, noncharacters.

    XML has no way to write these, so one of them in a record would make a picture unreadable.

    Example:
        >>> clean("a\x00b\ud800c\nd")
        'a b c\nd'
    """
    return "".join(c if c in "\n\t" or _can_be_shown(c) else " " for c in text)


def _can_be_shown(c: str) -> bool:
    last_of_plane = ord(c) & _NONCHARACTERS == _NONCHARACTERS
    return unicodedata.category(c) not in {"Cc", "Cs"} and not last_of_plane
