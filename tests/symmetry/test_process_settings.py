"""What an audit sets in its process, threads and collection of garbage, is given back."""

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from onsphere._torch.threads import threads_for
from onsphere._utils.garbage import seldom_collected
from onsphere.symmetry import ModelError, audit


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


class _Raising(_Counting):
    def forward(self, x: Tensor) -> Tensor:
        _SEEN.add(gc.get_threshold()[0])
        raise RuntimeError


@pytest.mark.parametrize("threshold", [0, 700, 10**6])
def test_garbage_is_collected_as_before_after_an_error(threshold: int) -> None:
    before = gc.get_threshold()
    gc.set_threshold(threshold, 7, 8)
    _SEEN.clear()
    try:
        with pytest.raises(ModelError):
            audit(_Raising(2, 2, device="meta"), torch.ones(1, 2, device="meta"))
        assert {0 if threshold == 0 else max(threshold, 50_000)} == _SEEN
        assert gc.get_threshold() == (threshold, 7, 8)
    finally:
        gc.set_threshold(*before)


@pytest.mark.usefixtures("two_threads")
def test_other_threads_leave_the_settings_of_the_process_alone() -> None:
    seen: list = []

    def of_another_thread() -> None:
        with seldom_collected(), threads_for(1):
            seen.extend([gc.get_threshold(), torch.get_num_threads()])

    before = gc.get_threshold(), torch.get_num_threads()
    other = threading.Thread(target=of_another_thread)
    other.start()
    other.join()
    assert seen == [*before]
    assert (gc.get_threshold(), torch.get_num_threads()) == before


class _Placed(nn.Module):
    """Adds positions that its forward pass makes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.into, self.out = nn.Embedding(8, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x + self.table(torch.arange(len(x)))).relu())


def test_tensors_may_be_made_elsewhere_by_default() -> None:
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(6, 4)
    with torch.device("meta"):
        placed = audit(_Placed(), torch.randn(6, 4))
        plain = audit(net, x)
        assert torch.empty(1).is_meta
    assert [(f.count, f.names) for f in placed.families] == [
        (5, ("into.weight", "into.bias", "out.weight"))
    ]
    assert [(f.count, f.names) for f in plain.families] == [(5, ("0.weight", "0.bias", "2.weight"))]
    assert plain.certified
