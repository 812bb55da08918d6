"""Recurrent layers, packed or not: what can be rescaled in them.

With ReLU a hidden channel has a factor: its rows of what comes in and of the biases, its row of
the recurrent matrix and, the other way round, its column there and in what reads it. With tanh and
sigmoid it has none. A projection of an LSTM is linear, so its channels have a factor each.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.exact.trace import trace
from symmetry.channels.slices import Entries, measured, rank

GIVEN, HIDDEN, PROJECTED = 4, 3, 2


class Tagged(nn.Module):
    """A recurrent layer and a head.

    Args:
        kind: of the layer.
        lengths: of the sequences, where they are packed.
        padding: what is written behind their ends.
        options: of the layer.
    """

    def __init__(
        self, kind: str, lengths: tuple[int, ...] = (), padding: float = 0.0, **options: Any
    ) -> None:
        super().__init__()
        self.lengths, self.padding = lengths, padding
        self.r = getattr(nn, kind)(GIVEN, HIDDEN, batch_first=True, **options)
        width = options.get("proj_size", HIDDEN) * (2 if options.get("bidirectional") else 1)
        self.h = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.lengths:
            return self.h(self.r(x)[0])
        packed = pack_padded_sequence(x, torch.tensor(self.lengths), batch_first=True)
        states, _ = pad_packed_sequence(
            self.r(packed)[0], batch_first=True, padding_value=self.padding
        )
        return self.h(states)


def layer(number: int, reader: str) -> tuple[int, dict[str, int]]:
    """How a hidden channel of a layer with ReLU scales; its recurrent matrix both ways."""
    own = (f"r.{n}_l{number}" for n in ("weight_ih", "bias_ih", "bias_hh", "weight_hh"))
    return (HIDDEN, {**dict.fromkeys(own, 1), reader: -1})


def projection(number: int, reader: str) -> tuple[int, dict[str, int]]:
    """How a channel of a projection scales."""
    own = {f"r.weight_hh_l{number}": 1, f"r.weight_hr_l{number}": -1}
    return (PROJECTED, {**own, reader: 1})


RELU = [layer(0, "r.weight_ih_l1"), layer(1, "h.weight")]
PROJECTIONS = [projection(0, "r.weight_ih_l1"), projection(1, "h.weight")]
CASES: dict[str, tuple[str, dict[str, Any], list[tuple[int, dict[str, int]]]]] = {
    "ReLU": ("RNN", {"nonlinearity": "relu", "num_layers": 2}, RELU),
    "projections": ("LSTM", {"proj_size": PROJECTED, "num_layers": 2}, PROJECTIONS),
    "tanh": ("RNN", {}, []),
    "LSTM": ("LSTM", {}, []),
    "GRU": ("GRU", {}, []),
}
X = (2, 5, GIVEN)


def found(net: nn.Module, x: Tensor) -> list[tuple[int, dict[str, int]]]:
    """Return how each family scales; a weight that scales both ways, as its rows do."""
    return [
        (f.count, {s.name: int(s.exponent) for s in reversed(f.slices)})
        for f in channel_symmetries(net, x, roles=trace(net, (x,)).roles)
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("lengths", [(), (5, 3)])
@pytest.mark.parametrize("name", CASES)
def test_channels_of_recurrent_layers(name: str, lengths: tuple[int, ...], device: str) -> None:
    kind, options, expected = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(X, dtype=torch.float64, device=device)
    net = Tagged(kind, lengths, **options).double().to(device)
    assert found(net, x) == expected


@pytest.mark.parametrize("lengths", [(), (5, 3)])
@pytest.mark.parametrize("name", CASES)
def test_what_is_claimed_is_the_null_space_of_derivatives(
    name: str, lengths: tuple[int, ...]
) -> None:
    kind, options, expected = CASES[name]
    torch.manual_seed(0)
    net, x = Tagged(kind, lengths, **options).double(), torch.randn(X, dtype=torch.float64)
    families = channel_symmetries(net, x, roles=trace(net, (x,)).roles)
    entries = Entries.of(net)
    null = measured(net, lambda g: (torch.randn(X, generator=g, dtype=x.dtype),), entries)
    claimed = entries.claimed(net, families)
    assert rank(null, claimed) == rank(claimed) == rank(null) == sum(n for n, _ in expected)


@pytest.mark.parametrize("lengths", [(5, 3), (5, 5)])
def test_a_padding_that_is_not_zero_fixes_the_channels_in_front_of_it(
    lengths: tuple[int, ...],
) -> None:
    kind, options, expected = CASES["ReLU"]
    net = Tagged(kind, lengths, padding=1.0, **options)
    assert found(net, torch.randn(X)) == expected[:1]  # whatever the lengths of this batch
