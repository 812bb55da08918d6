"""What decides what runs next: constants are the same in every run, anything else is not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry.exact.trace import trace


class _Model(nn.Module):
    """A weight, a buffer, a plain tensor, and a forward pass that decides by one of them."""

    def __init__(self, decides: Callable[["_Model", Tensor], object]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.register_buffer("buffer", torch.ones(2))
        self.register_buffer("passing", torch.ones(2, dtype=torch.bool), persistent=False)
        self.plain = torch.ones(2)
        self.decides = decides

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w * 2 if self.decides(self, x) else x * self.w


_OUTSIDE = torch.ones(2)


def _written_with_data(m: _Model, x: Tensor) -> Tensor:
    made = torch.zeros(2, 3)
    made[0] = x
    return made.sum() > 0


CONSTANT = {
    "a number": lambda m, x: torch.tensor(1.0) > 0,
    "a list": lambda m, x: torch.tensor([True, False]).any(),
    "positions": lambda m, x: (torch.arange(x.shape[-1]) > 1).all(),
    "a mask": lambda m, x: torch.ones(2, 2, dtype=torch.bool).tril().all(),
    "a shape": lambda m, x: torch.zeros_like(x).sum() > 0,
    "filled in place": lambda m, x: torch.empty(2).fill_(1.0).sum().item() > 1,
    "to Python": lambda m, x: torch.arange(3).tolist()[0] > 1,
    "where it is true": lambda m, x: torch.ones(3).nonzero().shape[0] > 1,
    "compared as a whole": lambda m, x: torch.equal(torch.ones(2), torch.ones(2)),
}
VARYING = {
    "an input": lambda m, x: x.sum() > 0,
    "an input, to Python": lambda m, x: x.tolist()[0] > 0,
    "an input, written into a constant": _written_with_data,
    "an input, compared as a whole": lambda m, x: torch.equal(x, torch.ones(3)),
    "an input, where it is true": lambda m, x: x.nonzero().shape[0] > 1,
    "a weight": lambda m, x: m.w.sum() > 0,
    "a buffer": lambda m, x: m.buffer.sum() > 0,
    "a buffer that is not saved": lambda m, x: m.passing.all(),
    "a tensor kept beside": lambda m, x: m.plain.sum() > 0,
    "a tensor outside": lambda m, x: _OUTSIDE.sum() > 0,
    "a random number": lambda m, x: torch.rand(()) > 0.5,
    "a random number in place": lambda m, x: torch.empty(2).uniform_().sum() > 1,
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constants_that_decide_are_no_dependence_on_data(name: str) -> None:
    assert not trace(_Model(CONSTANT[name]), (torch.ones(3),)).data_dependent


@pytest.mark.parametrize("name", VARYING)
def test_what_may_change_from_run_to_run_is_one(name: str) -> None:
    assert trace(_Model(VARYING[name]), (torch.ones(3),)).data_dependent


def test_a_small_constant_is_an_eps_wherever_it_is_kept() -> None:
    for eps in (lambda m: torch.tensor(1e-6), lambda m: m.plain[0] * 0 + 1e-6, lambda m: _SMALL):
        model = _Model(lambda m, x: False)
        model.forward = lambda x, eps=eps, m=model: x * m.w / torch.hypot(m.w, eps(m))
        assert len(trace(model, (torch.ones(3),)).basis) == 1


_SMALL = torch.tensor(1e-6)
