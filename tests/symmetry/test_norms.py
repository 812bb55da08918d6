"""Our own norms, audited: the spheres that the theory gives, from the units alone."""

from typing import Any

import pytest
import torch
from torch import nn

from onsphere.geometry import VectorAxes
from onsphere.norms import (
    COMPOSITES,
    METHODS,
    ActivationNorm,
    BatchRenorm,
    CosineLinear,
    DynamicTanh,
    EvoNormS0,
    GlobalResponseNorm,
    ModulatedConv2d,
    QKNorm,
    RobustNorm,
    SwitchableNorm,
    dora,
    parametrize,
)
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
    "sbn": ({WEIGHT}, ROWS, [BIAS], []),
    "l1bn": ({WEIGHT}, ROWS, [BIAS], []),
    "frn": ({WEIGHT, BIAS}, ROWS, [], []),
    "scale": ({WEIGHT, BIAS}, WHOLE, [], []),
    "pixel": ({WEIGHT, BIAS}, WHOLE, [], []),
    "wn": ({f"{ORIGINAL}1"}, ROWS, [], []),
    "cwn": ({f"{ORIGINAL}1"}, ROWS, [], [f"{ORIGINAL}1"]),
    "ws": ({ORIGINAL}, ROWS, [], [ORIGINAL]),
    "sn": ({ORIGINAL}, WHOLE, [], []),
    "demod": ({ORIGINAL}, ROWS, [], []),
    "ngpt": ({ORIGINAL}, ROWS, [], []),
}


def network(key: str) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer, head = nn.Conv2d(4, 6, 3), nn.Linear(54, 3)
        if METHODS[key].normalizes == "weight":
            return nn.Sequential(parametrize(layer, key), nn.Flatten(), nn.GELU(), head)
        size: Any = (6, 3, 3) if METHODS[key].takes_shape else 6
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


class Attention(nn.Module):
    """Two heads with QK-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 8) for _ in range(3))
        self.norm, self.head = QKNorm(4), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> Any:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (
            torch.unflatten(m(tokens), -1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(*self.norm(q, k), v)
        return self.head(nn.functional.gelu(y.transpose(1, 2).flatten(2)))


class Styled(nn.Module):
    """A modulated convolution with a style that the image gives."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.conv = nn.Linear(4, 4), ModulatedConv2d(4, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x, self.style(x.mean((2, 3))))
        return self.head(nn.functional.gelu(y).mean((2, 3)))


def after_conv(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), norm, nn.Flatten(), nn.GELU(), nn.Linear(54, 3)
    )  # fmt: skip


def adapted() -> nn.Module:
    conv = dora(nn.Conv2d(4, 6, 3), rank=2)
    nn.init.normal_(conv.get_parameter("parametrizations.weight.0.lora_B"))
    return nn.Sequential(conv, nn.Flatten(), nn.GELU(), nn.Linear(54, 3))


def response_norm() -> nn.Module:
    norm = GlobalResponseNorm(6)  # as it starts, it does nothing
    for value in norm.parameters():
        nn.init.normal_(value)
    return norm


BOTH = {WEIGHT: 1, BIAS: 1}
STATISTICS = {"1.running_mean": 1, "1.running_std": 1}
UPDATE = f"{ORIGINAL[:-8]}0.lora_"

# method: a network, the spheres with how they divide, and all scale symmetries but of what is inert
COMPOSITE_THEORY: dict[str, tuple[Any, list[tuple[set[str], VectorAxes]], list[dict[str, int]]]] = {
    # Only together with the running statistics that correct it.
    "brn": (
        lambda: after_conv(BatchRenorm(6)),
        [({*BOTH, *STATISTICS}, WHOLE)],
        [BOTH | STATISTICS],
    ),
    "grn": (lambda: after_conv(response_norm()), [], []),
    "qk": (
        Attention,
        [({f"{m}.weight", f"{m}.bias"}, GROUPS) for m in "qk"],
        [
            {"q.weight": 1, "q.bias": 1},
            {"k.weight": 1, "k.bias": 1},
            {"norm.q.weight": 1, "norm.k.weight": -1},
        ],
    ),
    "cos": (
        lambda: nn.Sequential(
            nn.Flatten(), CosineLinear(100, 6, bias=True), nn.GELU(), nn.Linear(6, 3)
        ),
        [({"1.weight"}, ROWS)],
        [{"1.weight": 1}],
    ),
    "switch": (lambda: after_conv(SwitchableNorm(6)), [(set(BOTH), WHOLE)], [BOTH]),
    "evo": (lambda: after_conv(EvoNormS0(6, groups=2)), [], [BOTH | {"1.v": -1}]),
    # The direction with B row by row, with A as a whole; A and B trade.
    "dora": (
        adapted,
        [({ORIGINAL, f"{UPDATE}B"}, ROWS), ({ORIGINAL, f"{UPDATE}A"}, WHOLE)],
        [{ORIGINAL: 1, f"{UPDATE}B": 1}, {ORIGINAL: 1, f"{UPDATE}A": 1}],
    ),
    "dyt": (lambda: after_conv(DynamicTanh((6, 3, 3))), [], [BOTH | {"1.alpha": -1}]),
    "lrn": (lambda: after_conv(nn.LocalResponseNorm(3)), [], []),
    # Degree 4/5, exactly: the weight trades with the gain. The bias is inert.
    "robust": (lambda: after_conv(RobustNorm(6)), [], [{WEIGHT: 5, "1.weight": -4}]),
    # Not a row of its own: the style has a sphere, too.
    "demodulation with styles": (
        Styled,
        [({"style.weight", "style.bias"}, WHOLE), ({"conv.weight"}, ROWS)],
        [{"style.weight": 1, "style.bias": 1}, {"conv.weight": 1}],
    ),
}


def test_the_table_of_composites_is_complete() -> None:
    assert set(COMPOSITE_THEORY) == {*COMPOSITES, "demodulation with styles"}


@pytest.mark.parametrize("key", COMPOSITE_THEORY)
def test_the_audit_finds_what_composites_have(key: str) -> None:
    make, spheres, symmetries = COMPOSITE_THEORY[key]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = audit(make(), X)
    assert [(set(s.names), s.axes) for s in found.spheres] == spheres
    assert found.inert == ([BIAS] if key == "robust" else [])
    assert found.unknown_ops == []
    active = [dict(v) for v in found.scale_symmetries if v != {BIAS: 1}]
    assert active == symmetries
