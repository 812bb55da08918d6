"""Beside the reference AutoAttack, if installed (``pip install --no-deps pyautoattack``)."""

import pytest
import torch

from onsphere.robustness import evaluate
from robustness.problems import on_digits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained():
    """A small network with GroupNorm trained on digits, and images that it was not shown."""
    return on_digits(
        lambda: torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.ReLU(),
            torch.nn.Conv2d(8, 16, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(144, 10),
        ),
        lr=5e-3, epochs=12, count=100,
    )  # fmt: skip


@pytest.mark.parametrize(("norm", "name", "eps"), [("linf", "Linf", 0.1), ("l2", "L2", 0.5)])
def test_robust_accuracy_is_at_most_the_references(norm, name, eps, trained):
    autoattack = pytest.importorskip("pyautoattack").AutoAttack
    net, x, y = trained
    with torch.random.fork_rng():
        _, predicted = autoattack(net, norm=name, eps=eps, seed=0).run_standard_evaluation(x, y)
    reference = int((predicted == y).sum())
    ours = evaluate(net, (x, y), eps=eps, norm=norm, checks=False).robust_accuracy.count
    assert 5 < reference < 95
    assert ours <= reference + 1
