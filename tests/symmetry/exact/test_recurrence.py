"""Recurrent networks without memory: three steps say what all of them say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from onsphere import audit
from onsphere.symmetry.exact import recurrence
from onsphere.symmetry.exact.dispatch_mode import Tracer


class Recurrent(nn.Module):
    """A recurrent network between two linear maps, on 9 steps."""

    def __init__(self, kind: Any, of: Callable[["Recurrent", Tensor], Tensor], **kwargs: Any):
        super().__init__()
        self.before = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.rnn = kind(4, 6, **kwargs)
        self.positions = nn.Parameter(torch.randn(9, 1, 4))
        self.gains = nn.Parameter(torch.rand(9, 1, 1) + 0.5)
        self.state = nn.Parameter(torch.randn(1, 2, 6))
        wide = kwargs.get("proj_size") or 6
        self.after = nn.Linear(wide * (1 + kwargs.get("bidirectional", False)), 2)
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, x)


def plain(m: Recurrent, x: Tensor) -> Tensor:
    return m.after(m.rnn(m.before(x))[0])


def normalized(m: Recurrent, x: Tensor) -> Tensor:
    return m.after(m.rnn(m.norm(m.before(x)))[0])


def with_positions(m: Recurrent, x: Tensor) -> Tensor:
    return m.after(m.rnn(m.before(x) + m.positions)[0])


def scaled_by_position(m: Recurrent, x: Tensor) -> Tensor:
    return m.after(m.rnn(m.before(x) * m.gains)[0])


def of_positions_alone(m: Recurrent, x: Tensor) -> Tensor:
    return m.after(m.rnn(m.positions)[0]) + x.mean()


def last_step(m: Recurrent, x: Tensor) -> Tensor:
    return m.after(m.rnn(m.before(x))[0][-1])


def last_state(m: Recurrent, x: Tensor) -> Tensor:
    states = m.rnn(m.before(x))[1]
    states = states[0] if isinstance(states, tuple) else states
    return m.after(states.sum(0).repeat(1, m.after.in_features // 6))


def centred_in_time(m: Recurrent, x: Tensor) -> Tensor:
    y = m.after(m.rnn(m.before(x))[0])
    return y - y.mean(0)


def own_state(m: Recurrent, x: Tensor) -> Tensor:
    state = (m.state, m.state) if isinstance(m.rnn, nn.LSTM) else m.state
    return m.after(m.rnn(m.norm(m.before(x)), state)[0])


def each_step_alone(m: Recurrent, x: Tensor) -> Tensor:
    y = m.after(m.rnn(m.before(x))[0])
    return y[3] + y[5] * m.gains[5] + y[0]


def normalized_in_time(m: Recurrent, x: Tensor) -> Tensor:
    y = m.after(m.rnn(m.before(x))[0])
    return nn.functional.layer_norm(y.movedim(0, -1), (9,))


def packed(m: Recurrent, x: Tensor) -> Tensor:
    return m.after(m.rnn(pack_sequence([m.before(x[:, 0]), m.before(x[:5, 1])]))[0].data)


CALLS = [
    plain, normalized, with_positions, scaled_by_position, of_positions_alone, last_step,
    last_state, centred_in_time, own_state, each_step_alone, normalized_in_time, packed,
]  # fmt: skip


@pytest.mark.parametrize("of", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (nn.LSTM, {}),
        (nn.GRU, {"bias": False}),
        (nn.RNN, {}),
        (nn.RNN, {"nonlinearity": "relu"}),
        (nn.LSTM, {"bidirectional": True, "num_layers": 2, "dropout": 0.5}),
        (nn.LSTM, {"proj_size": 5}),
    ],
    ids=["lstm", "gru", "tanh", "relu", "both-ways", "projected"],
)
def test_the_same_as_on_all_steps(
    kind: Any, kwargs: dict[str, Any], of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if of is own_state and kwargs.keys() & {"bidirectional", "proj_size"}:
        pytest.skip("its states have another shape")
    if of is last_state and "proj_size" in kwargs:
        pytest.skip("its states have another shape")
    model = Recurrent(kind, of, **kwargs).to("meta")
    x = torch.randn(9, 2, 3)
    found = audit(model, (x,)).to_dict()
    monkeypatch.setattr(recurrence, "_STEPS", 100)
    assert found == audit(model, (x,)).to_dict()


def operations(model: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> int:
    """Count the operations that an audit without memory follows."""
    count = [0]
    operate = Tracer.operate

    def counted(self: Tracer, *args: Any) -> Any:
        count[0] += 1
        return operate(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Tracer, "operate", counted)
        audit(model.to("meta"), (torch.randn(shape),))
    return count[0]


def test_long_sequences_take_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recurrent(nn.LSTM, plain)
    assert operations(model, (40, 2, 3), monkeypatch) == operations(model, (8, 2, 3), monkeypatch)
    batches = Recurrent(nn.GRU, plain, batch_first=True)
    few, many = (operations(batches, (2, n, 3), monkeypatch) for n in (8, 40))
    assert few == many
