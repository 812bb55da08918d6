"""Losses near 0, whose digits rounding decides: audited as any other, unless the model differs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere.symmetry import audit


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    chosen = torch.log_softmax(logits, -1).gather(1, labels[:, None])
    return -chosen.mean()


def _by_masks(logits: Tensor, labels: Tensor) -> Tensor:
    return -(F.one_hot(labels, logits.shape[1]) * logits.log_softmax(-1)).sum(-1).mean()


def _each(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _masked(logits: Tensor, labels: Tensor) -> Tensor:
    mask = labels >= 0
    return (mask * _each(logits, labels)).sum() / mask.sum()


def _indexed(logits: Tensor, labels: Tensor) -> Tensor:
    return _each(logits, labels)[labels >= 0].mean()


def _by_truth(logits: Tensor, labels: Tensor) -> Tensor:
    hot = F.one_hot(labels, logits.shape[1]).bool()
    return -(logits.log_softmax(-1) * hot).sum(-1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy, "gathered": _summed, "with masks": _by_masks,
    "masked": _masked, "indexed": _indexed, "by truth": _by_truth,
}  # fmt: skip


class Confident(nn.Module):
    """A classifier with its loss; it may compute something else in float32."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], odd: float = 1.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 5)
        self.loss, self.odd = loss, odd

    def logits(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return 700 * self.last(h * self.odd if h.dtype == torch.float32 else h)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.logits(x), labels)


def confident(loss: str, odd: float = 1.0) -> tuple[Confident, Tensor, Tensor]:
    torch.manual_seed(0)
    net, x = Confident(LOSSES[loss], odd), torch.randn(6, 8)
    labels = net.logits(x).argmax(-1)
    value = net(x, labels).item()
    assert 0 < value < 1e-5
    return net, x, labels


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_near_0_is_audited(loss: str) -> None:
    net, x, labels = confident(loss)
    found = audit(net, (x, labels))
    assert found.limits == []
    assert found.scale_symmetries == audit(net.train(), (x, labels % 2)).scale_symmetries != []


@pytest.mark.parametrize("loss", LOSSES)
def test_a_model_that_differs_is_refused_at_such_a_loss_too(loss: str) -> None:
    net, x, labels = confident(loss, odd=1.01)
    assert [limit.kind for limit in audit(net, (x, labels)).limits] == ["float64"]


REMAINDERS: list[Callable[[Tensor], Tensor]] = [
    lambda h: h - h.to(torch.bfloat16).to(h.dtype),
    lambda h: (h - h.half().to(h.dtype)).sum(-1),
]


class Remainder(nn.Module):
    """Returns what a shorter type leaves of its outputs."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.of = nn.Linear(8, 16), nn.Linear(16, 5), of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.last(self.first(x).relu()))


@pytest.mark.parametrize("of", REMAINDERS)
def test_what_rounding_leaves_over_is_not_picked(of: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    found = audit(Remainder(of), torch.randn(6, 8))
    assert found.scale_symmetries == found.inert == []
    assert [limit.kind for limit in found.limits] == ["float64"]
