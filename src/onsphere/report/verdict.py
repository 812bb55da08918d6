"""How verdicts are shown: a symbol and a word beside every colour, for screens and eyes differ."""

from dataclasses import dataclass

from onsphere.report.document import Verdict


@dataclass(frozen=True)
class Sign:
    """The look of one verdict.

    Args:
        symbol: one character.
        style: its class in a page.
        color: its colour in a terminal.
        plural: the verdict of several claims.
    """

    symbol: str
    style: str
    color: str
    plural: str


SIGNS = {
    Verdict.HOLDS: Sign("✓", "holds", "green", "hold"),
    Verdict.CONDITIONAL: Sign("◐", "conditional", "yellow", "hold under conditions"),
    Verdict.FAILS: Sign("✕", "fails", "red", "do not hold"),
    Verdict.OPEN: Sign("?", "open", "default", "undecided"),
}


def tally(verdicts: list[Verdict]) -> list[tuple[int, str]]:
    """Count verdicts, in words that agree with the number.

    Example:
        >>> tally([Verdict.HOLDS, Verdict.FAILS, Verdict.FAILS])
        [(1, 'holds'), (2, 'do not hold')]
    """
    counts = ((verdict, verdicts.count(verdict)) for verdict in Verdict)
    return [(n, v.value if n == 1 else SIGNS[v].plural) for v, n in counts if n]
