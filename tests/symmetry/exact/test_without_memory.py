"""Models on the meta device whose whole numbers decide what runs: packed sequences, positions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from onsphere.symmetry import ModelError, audit


class Packed(nn.Module):
    """Embeds tokens and reads them as packed sequences."""

    def __init__(self, *, in_order: bool) -> None:
        super().__init__()
        self.e, self.h, self.in_order = nn.Embedding(7, 4), nn.Linear(5, 3), in_order
        self.r = nn.LSTM(4, 5, batch_first=True)

    def forward(self, ids: Tensor, lengths: Any) -> Tensor:
        packed = pack_padded_sequence(
            self.e(ids), lengths, batch_first=True, enforce_sorted=self.in_order
        )
        return self.h(pad_packed_sequence(self.r(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize("in_order", [True, False])
def test_packed_sequences_need_only_their_lengths(in_order: bool) -> None:
    net = Packed(in_order=in_order).to("meta")
    ids = torch.zeros(3, 6, dtype=torch.long, device="meta")
    for lengths in (torch.tensor([6, 4, 2]), [6, 4, 2]):
        found = audit(net, (ids, lengths))
        assert [(f.names, f.count) for f in found.families] == [(("e.weight", "r.weight_ih_l0"), 4)]
    with pytest.raises(ModelError, match="give the lengths as a tensor on the CPU"):
        audit(net, (ids, torch.tensor([6, 4, 2], device="meta")))


class Positions(nn.Module):
    """Holds the whole numbers that it adds to token ids as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False)
        self.e, self.l = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.l(self.e(self.ids + ids).relu())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_parameter_may_hold_whole_numbers(device: str) -> None:
    found = audit(Positions().to(device), torch.zeros(3, dtype=torch.long, device=device))
    assert found.scale_symmetries == [{"e.weight": 1, "l.weight": -1}]
