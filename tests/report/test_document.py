import pytest

from onsphere.report import Outcome
from onsphere.report.document import SIGNS, tally


def test_every_outcome_has_its_own_sign():
    for part in ("symbol", "style", "color", "plural"):
        assert len({getattr(SIGNS[outcome], part) for outcome in Outcome}) == len(Outcome)


@pytest.mark.parametrize(
    ("outcomes", "counts"),
    [
        ([], []),
        ([Outcome.OPEN], [(1, "undecided")]),
        (
            [Outcome.REVERSED, Outcome.HOLDS, Outcome.MIXED, Outcome.HOLDS],
            [(2, "hold"), (1, "reversed"), (1, "differs")],
        ),
    ],
)
def test_tally(outcomes, counts):
    assert tally(outcomes) == counts
