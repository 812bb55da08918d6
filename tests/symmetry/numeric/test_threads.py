"""Small models run on one thread, and the number of threads is given back."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry import audit


class _Counting(nn.Linear):
    """Tells on how many threads it runs."""

    def forward(self, x: Tensor) -> Tensor:
        _SEEN.add(torch.get_num_threads())
        return super().forward(x)


_SEEN: set[int] = set()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("inputs", "batch", "threads"), [(8, 4, 1), (4_096, 4, 2), (2, 4_096, 2)], ids=str
)
def test_small_models_run_on_one_thread(inputs: int, batch: int, threads: int) -> None:
    _SEEN.clear()
    net = _Counting(inputs, 16)
    audit(net, torch.randn(batch, inputs), search_seconds=0)
    assert min(_SEEN) == threads
    assert torch.get_num_threads() == 2
