"""Our own norms, audited: the spheres that the theory gives, from the units alone."""

from typing import Any

import pytest
import torch
from torch import nn

from onsphere.geometry import VectorAxes
from onsphere.norms import METHODS, ActivationNorm, parametrize
from onsphere.symmetry import audit
from onsphere.symmetry.exact.trace import trace

X = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
BIAS, WEIGHT = "0.bias", "0.weight"
ROWS, GROUPS, WHOLE = VectorAxes(index=(0,)), VectorAxes(pieces=((0, 2),)), VectorAxes()
ORIGINAL = "0.parametrizations.weight.original"

# method: the weights of its sphere, how it divides, what is inert, what can shift
THEORY: dict[str, tuple[set[str], VectorAxes, list[str], list[str]]] = {
    "bn": ({WEIGHT}, ROWS, [BIAS], []),
    "in": ({WEIGHT}, ROWS, [BIAS], []),
    "ln": ({WEIGHT, BIAS}, WHOLE, [], [BIAS]),
    "gn": ({WEIGHT, BIAS}, GROUPS, [], [BIAS]),
    "rms": ({WEIGHT, BIAS}, WHOLE, [], []),
    "wn": ({f"{ORIGINAL}1"}, ROWS, [], []),
    "cwn": ({f"{ORIGINAL}1"}, ROWS, [], [f"{ORIGINAL}1"]),
    "ws": ({ORIGINAL}, ROWS, [], [ORIGINAL]),
    "sn": ({ORIGINAL}, WHOLE, [], []),
}


def network(key: str) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, head = nn.Conv2d(4, 6, 3), nn.Linear(54, 3)
        if METHODS[key].normalizes == "weight":
            return nn.Sequential(parametrize(layer, key), nn.Flatten(), nn.GELU(), head)
        size: Any = (6, 3, 3) if key in ("ln", "rms") else 6
        norm = ActivationNorm(key, size, num_groups=2 if key == "gn" else None)
        return nn.Sequential(layer, norm, nn.Flatten(), nn.GELU(), head)


def test_the_table_is_complete() -> None:
    assert set(THEORY) == set(METHODS)


@pytest.mark.parametrize("key", THEORY)
def test_the_audit_gives_the_spheres_of_theory(key: str) -> None:
    names, axes, inert, shifts = THEORY[key]
    found = audit(network(key), X)
    assert [(set(s.names), s.axes) for s in found.spheres] == [(names, axes)]
    assert (found.inert, found.unknown_ops) == (inert, [])
    assert sorted({s.name for s in found.shifts} - {"4.weight", "4.bias"}) == shifts


@pytest.mark.parametrize("key", THEORY)
def test_the_units_alone_give_them(key: str) -> None:
    """No search on numbers is needed, but for what has no effect."""
    names, _, inert, _ = THEORY[key]
    (symmetry,) = trace(network(key), (X,)).basis
    assert symmetry == dict.fromkeys({*names, *inert}, 1)
