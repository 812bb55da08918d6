"""Which of the inputs that were followed tell more than the first ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry.exact.trace import Call, trace
from onsphere.symmetry.search.reach import telling


class _Model(nn.Module):
    def __init__(self, scaled: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.w)


def by_values(x: Tensor, w: Tensor) -> Tensor:
    return x * w if x.sum() > 0 else x + w


def by_a_guard(x: Tensor, w: Tensor) -> Tensor:
    size = (x * w).norm()
    return torch.where(size > 0, x * w / size, torch.zeros(()))


def by_shape(x: Tensor, w: Tensor) -> Tensor:
    return x * w if len(x) == 2 else (x * w).abs()


def by_two_shapes(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).sinh() if len(x) == 1 else by_shape(x, w)


def plainly(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).tanh()


CASES = {plainly: 1, by_values: 2, by_a_guard: 2, by_shape: 1, by_two_shapes: 2}


@pytest.mark.parametrize("scaled", CASES, ids=lambda f: f.__name__)
def test_one_input_of_each_kind_is_enough_where_values_decide_nothing(
    scaled: Callable[[Tensor, Tensor], Tensor],
) -> None:
    last = 1 if scaled is by_two_shapes else 2
    others = [Call((torch.ones(3, 4),), {}), Call((torch.ones(last, 4),), {})]
    traced = trace(_Model(scaled), (torch.ones(2, 4),), others=others)
    assert telling(traced, others) == others[: CASES[scaled]]
