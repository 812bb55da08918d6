"""The laws of dynamics and the 15 predictions, beside what comes out."""

from collections.abc import Iterable, Iterator

from benchmarks import laws, predictions, training
from benchmarks.laws import Measured
from onsphere.report import Table


def tables(lengths: float = 20) -> Iterator[Table]:
    """Measure everything, table by table.

    Args:
        lengths: how many relaxation times a walk in equilibrium takes.
    """
    yield _table(
        "Equilibrium, random walks",
        (m for walk in (*laws.WALKS, *laws.PUBLISHED) for m in laws.settles(walk, 0, lengths)),
    )
    yield _table(
        "Equilibrium of Muon, random walks of matrices",
        (m for walk in laws.MATRICES for m in laws.settles(walk, 0, lengths / 5)),
    )
    yield _table("Growth without decay, random walks", laws.grows())
    yield _table("Relaxation, random walks", (m for w in laws.RELAXING for m in laws.relaxes(w)))
    yield _table("Rate drops, random walks", (m for p in laws.DROPPING for m in laws.drops(*p)))
    rows = [
        (p.number, p.statement, max(p.measure(seed) for seed in range(3)), p.tolerance)
        for p in predictions.IDENTITIES
    ]
    columns = ("", "what should be 0", "largest of 3 seeds", "tolerance")
    yield Table("Predictions 1 to 9, small networks, float64", columns, rows)
    yield _table("Predictions 10 to 12, a network on random labels", _networks())
    yield _table("Prediction 14, the same network", training.drops())
    yield Table(
        "Prediction 15, digits, l-inf, eps 0.1, PGD of 20 steps",
        ("attack", "robust accuracy"),
        list(training.attacked().items()),
    )


def _networks() -> Iterator[Measured]:
    yield from training.free()
    yield from training.fourth_root()
    yield from training.rotates()


def _table(title: str, measured: Iterable[Measured]) -> Table:
    rows = [
        (m.law, m.quantity, m.predicted, m.measured, f"{100 * m.off:+.2f}%", f"{m.tolerance:.1%}")
        for m in measured
    ]
    return Table(title, ("law", "quantity", "predicted", "measured", "off", "tolerance"), rows)
