"""Audits of small models: dimensions known from theory, certificates, and every way to object."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import onsphere as osp
from onsphere.geometry import VectorAxes
from onsphere.symmetry import Audit, Kind, ModelError, audit
from onsphere.symmetry.exact.trace import trace
from onsphere.symmetry.numeric.certificate import certify
from onsphere.symmetry.numeric.probe import Probe
from onsphere.symmetry.numeric.radial_derivatives import gather
from symmetry.oracle import count_wrong


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def mixed_network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
            nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10), nn.ReLU(),
            nn.Linear(10, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 5),
        )  # fmt: skip


@pytest.fixture(scope="module")
def mixed() -> Audit:
    return audit(mixed_network(), _normal(4, 3, 8, 8))


def test_the_mixed_network_of_the_theory(mixed: Audit) -> None:
    assert (len(mixed.parameters), len(mixed.scale_symmetries)) == (16, 8)
    assert mixed.inert == ["0.bias"]
    assert not mixed.unknown_ops
    assert mixed.own_spheres()["0.weight"].axes == VectorAxes(index=(0,))
    group = next(s for s in mixed.spheres if set(s.names) == {"3.weight", "3.bias"})
    assert group.axes == VectorAxes(pieces=((0, 2),))
    assert {"9.weight", "9.bias"} <= {s.name for s in mixed.shifts}


def test_batch_norm_in_eval_mode_moves_its_statistics() -> None:
    found = audit(mixed_network().eval(), _normal(4, 3, 8, 8))
    assert len(found.scale_symmetries) == 8
    moved = [v for v in found.scale_symmetries if "1.running_var" in v]
    assert moved
    assert all(v["1.running_var"] == 2 for v in moved)


def test_json_round_trips(mixed: Audit, tmp_path: Path) -> None:
    mixed.to_json(tmp_path / "audit.json")
    assert Audit.from_json(tmp_path / "audit.json") == mixed


def test_the_table_names_every_kind(mixed: Audit) -> None:
    text = str(mixed)
    for words in ("SCALE-INVARIANT,", "TOGETHER", "RESCALING", "SHIFT", "INERT"):
        assert words in text


def test_param_groups_hold_every_parameter_once(mixed: Audit) -> None:
    net = mixed_network()
    groups = mixed.param_groups(net, weight_decay=0.1)
    assert sorted(n for g in groups for n in g["names"]) == sorted(dict(net.named_parameters()))
    assert [g["names"] for g in groups if g["sphere"] is not None] == [["0.weight"]]


def test_the_decay_of_the_optimizer_holds_where_groups_were_told_none(mixed: Audit) -> None:
    net = mixed_network()
    for groups in (mixed.param_groups(net), mixed.param_groups(net, weight_decay=5e-4)):
        optimizer = osp.optim.SphereSGD(groups, lr=0.1, weight_decay=5e-4)
        for group in optimizer.param_groups:
            matrices = group["sphere"] is None and group["params"][0].ndim > 1
            assert group["weight_decay"] == (5e-4 if matrices else 0.0), group["names"]
    vectors = mixed.param_groups(net, weight_decay=5e-4, decay_vectors=True)
    assert [g["weight_decay"] for g in vectors] == [0.0, 5e-4]


def test_the_model_is_left_as_it_was() -> None:
    net = mixed_network()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    audit(net, _normal(4, 3, 8, 8))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_a_module_used_twice_is_left_as_it_was() -> None:
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.LayerNorm(4), layer)
    before = layer.weight.detach().clone()
    audit(net, _normal(3, 4))
    assert torch.equal(layer.weight, before)


def test_a_false_claim_fails_its_certificate() -> None:
    net, x = mixed_network(), (_normal(4, 3, 8, 8),)
    probe = Probe(net, x, {}, trace(net, x))
    points = [probe.given()]
    claims = [{"0.weight": Fraction(1)}, {"12.weight": Fraction(1)}]
    true, false = certify(probe, claims, points, gather(probe, points, [3]))
    assert true.holds
    assert not false.holds
    assert false.change > 1e-2


def test_compiled_and_bare_models_agree(mixed: Audit) -> None:
    compiled = torch.compile(mixed_network(), backend="eager")
    assert audit(compiled, _normal(4, 3, 8, 8)).scale_symmetries == mixed.scale_symmetries


def test_a_model_without_memory_gives_the_same_units() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 2))
    found = audit(net, torch.empty(3, 4, device="meta"))
    assert found.scale_symmetries[0] == {"0.weight": 1}
    assert not found.certified


class _Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return [1, 2] if x.shape[0] == 1 else self.inner(x)


BAD = (
    ("no parameters", nn.ReLU(), _normal(2, 3), "no parameters"),
    ("wrong shape", _Broken(), _normal(2, 4), "module 'inner'"),
    ("no float output", _Broken(), _normal(1, 3), "no floating-point tensor"),
)


@pytest.mark.parametrize(("name", "net", "x", "words"), BAD, ids=[b[0] for b in BAD])
def test_bad_models_are_named(name: str, net: nn.Module, x: Tensor, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        audit(net, x)


def test_nan_parameters_are_named() -> None:
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.bias[0] = float("nan")
    with pytest.raises(ModelError, match="'bias'"):
        audit(net, _normal(1, 2))


LONG = [101014, 103271, 310398, 310889, 312320]
"""Of these each takes 10 to 40 s."""


@pytest.mark.parametrize(
    "seed", [*(pytest.param(seed, marks=pytest.mark.slow) for seed in LONG), 410415, 502327]
)
def test_networks_that_were_once_wrong(seed: int) -> None:
    # Inert biases behind saturated scores; networks ill conditioned almost everywhere.
    reports: list[str] = []
    assert count_wrong(range(seed, seed + 1), lambda s, m: reports.append(m)) == (1, 0, 0), reports


@pytest.mark.slow
def test_five_thousand_random_networks() -> None:
    reports: list[str] = []
    networks, false, missed = count_wrong(range(5000), lambda s, m: reports.append(f"{s}: {m}"))
    print(f"{networks} networks, {false} with a false claim, {missed} with one missed")
    print("\n".join(reports))
    assert false == 0
    assert missed == 0, reports


def test_a_batch_with_more_than_forward_takes_is_one_line() -> None:
    net, x = nn.Linear(3, 2), torch.ones(2, 3)
    assert audit(net, {"input": x}).parameters.keys() == {"weight", "bias"}
    with pytest.raises(ModelError, match="forward of Linear takes input, and not labels, which"):
        audit(net, {"input": x, "labels": torch.ones(2)})


@pytest.mark.filterwarnings("ignore")  # nested tensors are a prototype
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_refused_with_a_line(layout: torch.layout) -> None:
    rows = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)
    for given in (rows, {"input": rows}, (rows,)):
        with pytest.raises(ModelError, match=r"an input is a nested tensor.*to_padded_tensor"):
            audit(nn.Linear(3, 2), given)


def test_a_packed_sequence_is_one_input() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.inner = nn.LSTM(3, 4), nn.Linear(4, 5)
            self.norm, self.head = nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 2)

        def forward(self, packed: PackedSequence) -> Tensor:
            return self.head(self.norm(self.inner(self.lstm(packed)[0].data)))

    generator = torch.Generator().manual_seed(0)
    rows = pack_sequence([torch.randn(n, 3, generator=generator) for n in (4, 2)])
    found = audit(Packed(), rows)
    assert [s.names for s in found.spheres] == [("inner.weight", "inner.bias")]
    assert found.certified


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())


OTHER = {
    "numpy": (lambda: nn.Linear(3, 2), np.ones((2, 3)), "is a numpy array.*from_numpy.*float64"),
    "loader": (
        lambda: nn.Linear(3, 2), torch.utils.data.DataLoader([torch.ones(3)]), "a data loader; give"
    ),
    "lazy": (lazy, torch.ones(2, 4), "'0.weight' is not initialized yet.*run the model once"),
    "function": (lambda: torch.relu, torch.ones(2), "is a torch.nn.Module, got a builtin"),
    "state dict": (lambda: nn.Linear(3, 2).state_dict(), torch.ones(2, 3), "got a OrderedDict"),
    "nothing": (lambda: nn.Linear(3, 2), None, "given: nothing"),
    "words": (lambda: nn.Linear(3, 2), "abc", "raised TypeError"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "given", "says"), OTHER.values(), ids=OTHER.keys())
def test_another_model_or_input_is_one_line(make: Any, given: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says) as raised:
        audit(make(), given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"search_seconds": "x"}, "search_seconds is a number, 0 or more, got 'x'"),
        ({"search_seconds": -1}, "0 or more, got -1"),
        ({"search_seconds": float("nan")}, "0 or more, got nan"),
        ({"output": 3}, "output is a function that picks tensors.*got 3"),
        ({"progress": 3}, "progress is True, False or a function, got 3"),
    ],
)
def test_an_option_of_another_kind_is_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        audit(nn.Linear(3, 2), torch.ones(4, 3), **options)


class Flex(nn.Module):
    """Attention by compiled kernels, which the CPU has no gradient of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return flex_attention(h, h, h)


@pytest.mark.filterwarnings("ignore")  # flex_attention wants to be compiled
@pytest.mark.parametrize("train", [True, False])
def test_flex_attention_is_refused_with_a_line(train: bool) -> None:
    with pytest.raises(ModelError, match=r"calls flex_attention, .* scaled_dot_product_attention"):
        audit(Flex().train(train), _normal(1, 2, 16, 8))


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 2)

    def forward(self, rows: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * self.map(rows * mask)


class _Looking(_Masked):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.map(batch["rows"])


class _Broken(_Masked):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rows": torch.ones(4, 3)}, "given: rows (missing a required argument: 'mask')"),
        ({"a": torch.ones(4, 3), "b": torch.ones(4, 3)}, "given: a dictionary with a, b (missing"),
        ((torch.ones(4, 3),) * 3, "given: 3 by position (too many positional arguments)"),
    ],
)
def test_inputs_that_forward_does_not_take_are_told_by_name(given: Any, words: str) -> None:
    with pytest.raises(ModelError) as told:
        audit(_Masked(), given)
    assert str(told.value).startswith("forward of _Masked takes rows, mask (optional: scale); ")
    assert words in str(told.value)
    assert str(told.value).endswith("give a dictionary with these names, or a tuple in this order")


def test_a_dictionary_with_other_keys_is_told_of() -> None:
    with pytest.raises(ModelError, match=r"went in as one dictionary, with pixels: if forward is"):
        audit(nn.Linear(3, 2), {"pixels": torch.ones(4, 3)})
    with pytest.raises(ModelError, match=r"raised KeyError: 'rows' \(the batch went in as one"):
        audit(_Looking(), {"pixels": torch.ones(4, 3)})


class _Raising(nn.Linear):
    """Raises what it is given, whatever the batch."""

    def __init__(self, error: Exception) -> None:
        super().__init__(3, 2)
        self.error = error

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        KeyError(), KeyError(["a"]), KeyError("pixels"), KeyError(1, 2),
        AttributeError("'Net' object has no attribute 'predict'"), TypeError("no state_dict"),
    ],
    ids=repr,
)  # fmt: skip
def test_other_errors_are_not_laid_on_a_dictionary(error: Exception) -> None:
    with pytest.raises(ModelError, match=f"the model raised {type(error).__name__}") as told:
        audit(_Raising(error), {"pixels": torch.ones(4, 3)})
    assert ("one dictionary" in str(told.value)) == (error.args == (["a"],))


def test_an_input_by_name_alone_is_asked_for_by_name() -> None:
    class ByName(nn.Linear):
        def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
            return super().forward(x * mask)

    with pytest.raises(ModelError, match=r"give a dictionary with these names$"):
        audit(ByName(3, 2), torch.ones(4, 3))


def test_an_error_inside_the_model_stays_its_own() -> None:
    with pytest.raises(ModelError, match=r"model raised TypeError: .* missing 1 required posit"):
        audit(_Broken(), torch.ones(4, 3))


def test_a_hook_may_give_what_is_missing() -> None:
    net = _Masked()
    net.register_forward_pre_hook(lambda _, args: (*args, torch.ones(3)))
    assert "map.weight" in audit(net, torch.randn(4, 3)).parameters
    net.map = nn.Linear(7, 2)
    with pytest.raises(ModelError, match="the model raised RuntimeError in module 'map'"):
        audit(net, torch.ones(4, 3))


class _Careful(nn.Module):
    """Sends rows to one of two maps, and refuses scores that are far too large."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.first = nn.Linear(4, 2), nn.Linear(4, 4)
        self.maps = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        with torch.no_grad():
            self.scores.weight.fill_(-12.5)
            self.scores.bias.copy_(torch.tensor([50.0, 51.0]))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        if not (scores.detach().abs() < 20).all():
            raise ValueError("the scores are too large")
        chosen, y = scores.argmax(-1, keepdim=True), self.first(x)
        for k, own in enumerate(self.maps):
            if (chosen == k).any():
                y = torch.where(chosen == k, own(y), y)
        return y.tanh()


def test_weights_that_a_model_refuses_count_as_not_reached() -> None:
    torch.manual_seed(1)
    found = audit(_Careful().double(), torch.ones(1, 4, dtype=torch.float64))
    assert {n for n, kind in found.kinds.items() if kind is Kind.UNREACHED} >= {"maps.0.weight"}


def test_what_the_function_for_outputs_raises_is_one_line() -> None:
    said = r"output raised AttributeError: .*no attribute 'logits'; it was given .* a Tensor$"
    with pytest.raises(ModelError, match=said):
        audit(nn.Linear(3, 2), torch.randn(4, 3), output=lambda result: result.logits)


class _Swallows(nn.Module):
    """Takes any keyword, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(
        self, input_ids: Tensor | None = None, mask: Tensor | None = None, **_: object
    ) -> Tensor:
        if input_ids is None:
            raise ValueError("give input_ids")
        return self.head(input_ids) * (1 if mask is None else mask)


def test_a_misspelt_key_is_named() -> None:
    with pytest.raises(ModelError, match=r"give input_ids; 'inputs_ids' .* mean 'input_ids'\?$"):
        audit(_Swallows(), {"inputs_ids": torch.randn(4, 3)})


def test_inputs_that_stayed_as_given_are_named() -> None:
    class Picky(_Swallows):
        def forward(self, input_ids: Tensor, mask: Tensor, **more: Tensor) -> Tensor:
            if not mask.equal(torch.tensor([2, 5, 9, 11])):
                raise ValueError("another mask")
            return super().forward(input_ids)

    said = [
        *audit(Picky(), (torch.randn(4, 3), torch.tensor([2, 5, 9, 11]))).conditions,
        *audit(Picky(), {"input_ids": torch.randn(4, 3),
                         "mask": torch.tensor([2, 5, 9, 11])}).conditions,
    ]  # fmt: skip
    stayed = [words.split("(")[1].split(")")[0] for words in said if "stayed as given" in words]
    assert stayed == ["args[1]", "mask"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.full((4, 3), math.nan), "an input holds NaN"),
        (torch.empty(0, 3), r"an input is empty, of shape \(0, 3\)"),
    ],
)
def test_inputs_that_tell_nothing_are_named(given: Tensor, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        audit(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), given)


class _Unread(nn.Module):
    """A map whose results are rounded without a derivative, and a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.idle = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.floor_divide(self.map(x), 0.1)


def test_without_gradients_a_weight_that_nothing_reads_is_not_refuted() -> None:
    found = audit(_Unread(), torch.randn(6, 4))
    assert found.kinds["idle"] == "inert"
    assert [limit.kind for limit in found.limits] == ["gradients"]
