import pytest

from onsphere.report import Verdict
from onsphere.report.document import SIGNS, tally


def test_every_verdict_has_its_own_sign():
    for part in ("symbol", "style", "color", "plural"):
        assert len({getattr(SIGNS[verdict], part) for verdict in Verdict}) == len(Verdict)


@pytest.mark.parametrize(
    ("verdicts", "counts"),
    [
        ([], []),
        ([Verdict.OPEN], [(1, "undecided")]),
        ([Verdict.FAILS, Verdict.HOLDS, Verdict.HOLDS], [(2, "hold"), (1, "does not hold")]),
    ],
)
def test_tally(verdicts, counts):
    assert tally(verdicts) == counts
