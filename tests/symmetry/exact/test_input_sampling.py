"""Other inputs of the same kinds, and the run in float64 beside the model."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry import audit
from onsphere.symmetry.exact.input_sampling import OtherInputs
from onsphere.symmetry.exact.rules.table import rule_of
from onsphere.symmetry.exact.trace import trace
from onsphere.symmetry.numeric.float64_mode import Float64Mode
from onsphere.symmetry.numeric.probe import Probe
from onsphere.symmetry.numeric.reproduction import difference


def _others(*args: Any, rows: Mapping[int, int] | None = None, runs: Any = None) -> OtherInputs:
    generator = torch.Generator().manual_seed(0)
    return OtherInputs(args, {}, rows or {}, runs or (lambda *_: True), generator)


def _draws(others: OtherInputs, turns: int = 8) -> list[Tensor]:
    return [others.draw(t, lambda x: x + 1)[0][0] for t in range(turns)]


def test_token_ids_are_drawn_among_the_rows_of_their_table() -> None:
    drawn = torch.cat(
        [d.flatten() for d in _draws(_others(torch.zeros(2, 5, dtype=int), rows={0: 7}))]
    )
    assert set(drawn.tolist()) == set(range(7))


def test_other_whole_numbers_stay_between_those_given() -> None:
    drawn = torch.cat(_draws(_others(torch.tensor([3, 5, 9]))))
    assert 3 <= int(drawn.min()) < int(drawn.max()) <= 9


def test_lengths_are_drawn_up_to_the_length_of_their_axis() -> None:
    others = _others(torch.zeros(3, 1).long(), torch.tensor([1, 1, 1]), rows={0: 9})
    drawn = [others.draw(t, lambda x: x)[0] for t in range(8)]
    grown = torch.cat([lengths for ids, lengths in drawn if ids.shape[1] == 3])
    assert set(grown.tolist()) == {1, 2, 3}
    assert all(bool((n == 1).all()) for ids, n in drawn if ids.shape[1] == 1)


def test_repeats_are_no_places_in_a_table() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 3)

        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            return self.l(x)[torch.repeat_interleave(torch.arange(len(counts)), counts)]

    found = trace(Repeats(), (torch.randn(2, 4), torch.tensor([1, 2])))
    assert found.rows == {}


def test_what_marks_left_out_entries_stays() -> None:
    given = torch.tensor([[-100, 2, 4], [1, -100, 3]])
    same = [d for d in _draws(_others(given, rows={0: 5})) if d.shape == given.shape]
    assert same
    assert all(torch.equal(d == -100, given == -100) for d in same)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_masks_hide_some_entries_and_never_a_whole_row(dtype: torch.dtype) -> None:
    drawn = _draws(_others(torch.ones(3, 6).to(dtype)))
    assert all(d.dtype == dtype and bool(d[:, 0].all()) for d in drawn)
    assert any(not bool(d.all()) for d in drawn)


def test_places_where_pieces_begin_stay() -> None:
    given = torch.tensor([0, 3, 7])
    drawn = _draws(_others(given))
    same = [d for d in drawn if len(d) == len(given)]
    assert same
    assert all(torch.equal(d, given) for d in same)
    assert all(torch.equal(d.unique(), given) for d in drawn)


def test_places_where_pieces_begin_rise_in_other_lengths_too() -> None:
    """Those of bags that did not rise would have wrong gradients."""
    given = torch.tensor([0, 2, 3, 3, 5, 8])
    drawn = _draws(_others(given))
    assert {len(d) for d in drawn} > {len(given)}
    assert all(bool((d.diff() >= 0).all()) for d in drawn)


def test_lengths_change_where_the_model_takes_others() -> None:
    def runs(args: tuple[Tensor, ...], _: Mapping[str, Any]) -> bool:
        return args[0].shape[2] == 4  # features are fixed

    others = _others(torch.randn(1, 1, 4), runs=runs)
    assert others.resized == ((0, 1, 3), (1, 1, 3))
    assert {tuple(d.shape) for d in _draws(others)} == {(3, 3, 4), (1, 1, 4)}


class _Summed(nn.Module):
    """Adds a bias up over as many positions as there are, and another once."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.conv, self.later = convolution, nn.Parameter(torch.zeros(5))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x).flatten(2).sum(2) + self.later))


@pytest.mark.parametrize("shape", [(2, 3, 12), (2, 3, 16), (16, 3, 16), (2, 3, 18), (1, 3, 8)])
@pytest.mark.parametrize(("stride", "kernel"), [(4, 4), (4, 1), (2, 2)])
def test_strides_move_on_with_the_length(shape: tuple[int, ...], stride: int, kernel: int) -> None:
    torch.manual_seed(0)
    model = _Summed(nn.Conv1d(3, 5, kernel, stride))
    assert audit(model, torch.randn(shape)).shift_families == []


def test_strides_move_on_with_the_size_of_an_image() -> None:
    torch.manual_seed(0)
    steps = [nn.Conv2d(w, 5, 3, 2, 1) for w in (3, 5, 5)]
    model = _Summed(nn.Sequential(*steps))
    assert audit(model, torch.randn(2, 3, 16, 16)).shift_families == []


def test_inputs_of_one_length_change_together() -> None:
    def runs(args: tuple[Tensor, ...], _: Mapping[str, Any]) -> bool:
        ids, mask, square = args
        n = ids.shape[1]
        return mask.shape[1] == n and square.shape[1:] == (n, n) and len(ids) == len(mask) == 2

    ids, mask, square = torch.zeros(2, 5).long(), torch.ones(2, 5).long(), torch.randn(1, 5, 5)
    others = _others(ids, mask, square, rows={0: 9}, runs=runs)
    assert (1, 5, 11) in others.resized


def test_what_the_model_does_not_run_on_is_not_used() -> None:
    given = torch.tensor([4, 2, 1])

    def runs(args: tuple[Tensor, ...], _: Mapping[str, Any]) -> bool:
        return bool((args[0].diff() <= 0).all())  # sorted lengths, as packed sequences want them

    drawn = [d for d in _draws(_others(given, runs=runs)) if len(d) == 3]
    assert all(bool((d.diff() <= 0).all()) for d in drawn)
    assert not all(torch.equal(d, given) for d in drawn)


# --- the run in float64 ---------------------------------------------------------------------------


class _Mask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(len(x), 6)
        mask[:, ::2] = 1.0
        return torch.tanh(self.l(x)) * mask


def _probe(model: nn.Module, x: Tensor) -> Probe:
    return Probe(model, (x,), {}, trace(model, x))


def test_a_run_that_loses_what_is_written_is_seen_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, x = _Mask().eval(), torch.randn(3, 4)
    assert difference(_probe(model, x), (x,), {}) is None

    def copied(self: Float64Mode, value: Any) -> Any:  # as it was: every argument a copy in float64
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            return value.to(torch.float64)
        return torch.float64 if value is torch.float32 else value

    monkeypatch.setattr(Float64Mode, "lift", copied)
    monkeypatch.setattr("onsphere.symmetry.numeric.float64_mode._fresh", lambda value: value)
    monkeypatch.setattr("onsphere.symmetry.numeric.reproduction._same_in_float64", lambda *_: False)
    said = difference(_probe(model, x), (x,), {})
    assert said is not None
    assert "aten::" in said


def test_nothing_is_claimed_of_a_model_that_is_another_one_in_float64() -> None:
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.n = nn.Linear(4, 6, bias=False), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.l(x)
            return self.n(y) if y.dtype == torch.float64 else torch.tanh(y)

    torch.manual_seed(0)
    found = audit(Depends().eval(), torch.randn(3, 4))
    assert found.scale_symmetries == []
    assert (found.spheres, found.inert, found.shifts, found.parts) == ([], [], [], [])
    assert [limit.kind for limit in found.limits] == ["float64"]
    assert "nothing is claimed" in str(found)


def test_nothing_is_claimed_of_a_model_that_refuses_float64() -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return self.l(x)

    found = audit(Refuses().eval(), torch.randn(3, 4))
    assert found.scale_symmetries == []
    assert [limit.kind for limit in found.limits] == ["float64"]
    assert "float32 only" in found.limits[0].words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_random_numbers_are_those_of_the_model(dtype: torch.dtype) -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.drop = nn.Linear(4, 32), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(self.l(x))
            y = y + torch.randn_like(y) + torch.rand(32, dtype=y.dtype)
            y = y + torch.randn(32).to(y.dtype) * torch.zeros_like(y).bernoulli_(0.5)
            return y * torch.bernoulli(torch.full_like(y, 0.5)) + torch.empty_like(y).exponential_()

    torch.manual_seed(0)
    model, x = Draws().to(dtype), torch.randn(5, 4).to(dtype)
    assert difference(_probe(model, x), (x,), {}) is None


def test_model_inputs_and_global_state_are_left_as_they_were() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.l = nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 3)
            self.state, self.seen, self.calls = torch.zeros(2, 3), [], 0

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            self.calls += 1
            x.mul_(2)
            y = self.l(self.e(ids).mean(1) * x)
            self.state += y.detach()
            self.seen.append(y)
            self.last = y
            return y + self.state

    torch.manual_seed(0)
    model = Writes()
    ids, x = torch.randint(0, 9, (2, 5)), torch.ones(2, 4)
    table, rng, default = (
        model.e.weight.detach().clone(),
        torch.get_rng_state(),
        torch.get_default_dtype(),
    )
    audit(model, (ids, x))
    assert torch.equal(model.e.weight, table)
    assert torch.equal(x, torch.ones(2, 4))
    assert not model.state.any()
    assert (model.seen, model.calls, hasattr(model, "last")) == ([], 0, False)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() == default


# --- rules ----------------------------------------------------------------------------------------


def _factories() -> list[str]:
    """Operations that make a tensor of floating-point numbers out of shapes and numbers alone."""
    wanted = []
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in getattr(packet, "overloads", list)():
            schema = getattr(packet, overload)._schema
            kinds = [str(a.type) for a in schema.arguments]
            makes = [str(r.type) for r in schema.returns] == ["Tensor"]
            if (
                makes
                and not any("Tensor" in k for k in kinds)
                and any(a.name == "dtype" for a in schema.arguments)
            ):
                wanted.append(f"aten::{name}")
    return sorted(set(wanted))


LIKE_ANOTHER = [
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like"),
    *("ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
]
LEFT_OUT = {"_make_dep_token", "from_file"}


def test_every_factory_has_a_rule() -> None:
    names = [*_factories(), *(f"aten::{n}" for n in LIKE_ANOTHER)]
    assert len(names) > 25
    assert {n for n in names if rule_of(n) is None} <= {f"aten::{n}" for n in LEFT_OUT}
