"""Folding: the same function, and what must be refused is refused with its reason."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onsphere as osp
from onsphere.norms import parametrize
from onsphere.symmetry import FoldError, fold
from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.rewrite.folding.certificate import Certificate
from onsphere.symmetry.rewrite.folding.kinds.batch_norms import propose_batch_norm
from onsphere.symmetry.rewrite.folding.linear_maps import linear_maps
from onsphere.symmetry.rewrite.folding.targets import Known
from onsphere.symmetry.rewrite.verification import outputs_in_float64, wide_state


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms gains of both signs, shifts and statistics, as training does."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_var"):
                t.uniform_(0.5, 2.0, generator=g)
            elif t.ndim == 1 and t.is_floating_point():
                t.normal_(generator=g)
    return net.eval()


def check(net: nn.Module, x: Any, **kinds: tuple[int, int]) -> osp.symmetry.Folded:
    """Fold, compare directly, and compare what was folded of each kind."""
    before = copy.deepcopy(net.state_dict())
    folded = fold(net, x)
    report = folded.report
    assert {k: report.count(k) for k in kinds} == kinds, str(report)
    assert report.change_in_float64 <= 1e-12
    assert report.change <= 1e-5
    given = (x,) if isinstance(x, Tensor) else x
    with torch.no_grad():
        torch.testing.assert_close(folded.model(*given), net(*given), rtol=1e-4, atol=1e-5)
    for name, t in net.state_dict().items():
        assert torch.equal(before[name], t), name
    return folded


def reason(net: nn.Module, x: Any, name: str, kind: str | None = None) -> str:
    """Fold, and return why something stays: the first reason that is given."""
    kept = [p for p in check(net, x).report.kept if p.name == name and kind in (None, p.kind)]
    return kept[0].reason


# --- BatchNorm into the map that writes its input -------------------------------------------------

KINDS = {
    "plain": ("Conv", 1), "grouped": ("Conv", 2), "depthwise": ("Conv", 4),
    "transposed": ("ConvTranspose", 1), "grouped transposed": ("ConvTranspose", 2),
    "depthwise transposed": ("ConvTranspose", 4),
}  # fmt: skip


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bias", "affine"), [(True, True), (False, False)])
def test_folds_every_convolution(dimensions: int, kind: str, bias: bool, affine: bool) -> None:
    of, groups = KINDS[kind]
    if dimensions == 2:
        bias = not bias  # so that the other combinations are seen as well
    outputs = 4 if "depthwise" in kind else 6
    conv = getattr(nn, f"{of}{dimensions}d")(4, outputs, 3, 2, 1, groups=groups, bias=bias)
    norm = getattr(nn, f"BatchNorm{dimensions}d")(outputs, affine=affine)
    torch.manual_seed(0)
    net = shaken(nn.Sequential(conv, norm, nn.ReLU()))
    folded = check(net, torch.randn(2, 4, *[5] * dimensions), batchnorm=(1, 1))
    assert isinstance(folded.model[1], nn.Identity)
    assert folded.report.folded[0].into == ("0",)


class Net(nn.Module):
    """Some layers, and a function of them."""

    def __init__(self, run: Any, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        """Run the function."""
        return self.run(self, *inputs)


def test_folds_through_a_view() -> None:
    net = nn.Sequential(nn.Linear(3, 24), nn.Unflatten(1, (6, 2, 2)), nn.BatchNorm2d(6), nn.ReLU())
    check(shaken(net), torch.randn(4, 3), batchnorm=(1, 1))


def test_folds_into_several_writers_behind_a_concatenation() -> None:
    net = Net(
        lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], 1)).relu(),
        a=nn.Conv2d(3, 4, 1, bias=False), b=nn.Conv2d(3, 2, 3, padding=1), norm=nn.BatchNorm2d(6),
    )  # fmt: skip
    folded = check(shaken(net), torch.randn(2, 3, 5, 5), batchnorm=(1, 1))
    assert set(folded.report.folded[0].into) == {"a", "b"}


def test_folds_depthwise_transposed_writers_behind_a_concatenation() -> None:
    net = Net(
        lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], 1)).relu(),
        a=nn.ConvTranspose2d(3, 3, 2, groups=3), b=nn.ConvTranspose2d(3, 3, 2, groups=3),
        norm=nn.BatchNorm2d(6),
    )  # fmt: skip
    check(shaken(net), torch.randn(2, 3, 5, 5), batchnorm=(1, 1))


def test_folds_a_slice_of_a_map_into_its_rows() -> None:
    net = Net(
        lambda m, x: (lambda y: m.norm(y[:, :4]) + y[:, 4:].sigmoid())(m.a(x)),
        a=nn.Linear(3, 8), norm=nn.BatchNorm1d(4),
    )  # fmt: skip
    check(shaken(net), torch.randn(4, 3), batchnorm=(1, 1))


def test_folds_zero_gains() -> None:
    net = shaken(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    with torch.no_grad():
        net[1].weight[1] = 0.0
    check(net, torch.randn(2, 3, 6, 6), batchnorm=(1, 1))


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm whose numbers are buffers, as detection models have it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(count))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def test_folds_a_frozen_norm_whose_eps_is_in_its_code() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4), nn.ReLU())
    check(shaken(net), torch.randn(2, 3, 6, 6), batchnorm=(1, 1))


def test_folds_instance_norm_with_statistics() -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    check(
        shaken(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())),
        torch.randn(2, 3, 6, 6),
        batchnorm=(1, 1),
    )


# --- what must be refused -------------------------------------------------------------------------


def test_refuses_a_norm_behind_an_activation() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    assert "'relu' in '1' writes its input" in reason(shaken(net), torch.randn(2, 3, 6, 6), "2")


def test_refuses_a_norm_whose_input_others_read() -> None:
    net = Net(
        lambda m, x: (lambda y: m.norm(y).relu() + y)(m.a(x)),
        a=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4),
    )  # fmt: skip
    assert "others read its input as well: 'add'" in reason(
        shaken(net), torch.randn(2, 3, 6, 6), "norm"
    )


def test_refuses_a_norm_behind_a_concatenation_that_others_read() -> None:
    def dense(m: Net, x: Tensor) -> Tensor:
        first = m.a(x)
        second = m.b(m.one(first).relu())
        return m.two(torch.cat([first, second], 1)).relu()

    net = Net(
        dense, a=nn.Conv2d(3, 4, 1), one=nn.BatchNorm2d(4), b=nn.Conv2d(4, 2, 1),
        two=nn.BatchNorm2d(6),
    )  # fmt: skip
    assert "others read its input as well" in reason(shaken(net), torch.randn(2, 3, 6, 6), "two")


def test_refuses_a_norm_of_the_input() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert "one of the model's inputs" in reason(shaken(net), torch.randn(4, 3), "0")


def test_refuses_a_map_that_writes_two_norms() -> None:
    net = Net(
        lambda m, x, y: m.one(m.a(x)).relu() + m.two(m.a(y)).relu(),
        a=nn.Conv2d(3, 4, 1), one=nn.BatchNorm2d(4), two=nn.BatchNorm2d(4),
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 6)
    assert "tied" in reason(shaken(net), (x, x.flip(0)), "one")


def test_a_shift_stays_in_front_of_zero_padding() -> None:
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3, padding=1))
    folded = check(shaken(net), torch.randn(2, 4, 6, 6), gain=(1, 1))
    assert folded.report.folded[0].note == "its shift stays: 1 pads with zeros"
    assert torch.equal(folded.model[0].weight, torch.ones(4))


def test_refuses_a_reader_that_is_not_linear() -> None:
    net = Net(
        lambda m, x: (lambda y: m.a(y) + F.gelu(y))(m.norm(x)),
        norm=nn.LayerNorm(4), a=nn.Linear(4, 4),
    )  # fmt: skip
    found = reason(shaken(net), torch.randn(2, 4), "norm")
    assert found == "'gelu' reads its output, and is no linear map"


@pytest.mark.parametrize("outputs", [4, 8])
@pytest.mark.parametrize("groups", [2, 4])
def test_gain_and_shift_go_through_a_channel_shuffle(groups: int, outputs: int) -> None:
    def shuffled(m: nn.Module, x: Tensor) -> Tensor:
        y = m.norm(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return m.conv(y)

    net = Net(shuffled, norm=nn.GroupNorm(1, 4), conv=nn.Conv2d(4, outputs, 3, groups=groups))
    report = check(shaken(net), torch.randn(2, 4, 6, 6), gain=(1, 1)).report
    assert report.folded[0].note == ""


def test_refuses_a_tied_embedding() -> None:
    net = Net(
        lambda m, x: m.head(m.norm(m.table(x))),
        table=nn.Embedding(7, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 7, bias=False),
    )  # fmt: skip
    net.head.weight = net.table.weight
    found = reason(shaken(net), torch.arange(7).reshape(1, 7), "norm")
    assert "'table.weight' reads its output and is tied: 'embedding' in 'table'" in found


def test_a_wrong_fold_is_seen() -> None:
    net = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 6, 6)
    state = wide_state(net)
    known = Known(net, channel_symmetries(net, (x,)), linear_maps(net), state, True)
    right = propose_batch_norm(known, "1", net[1])
    assert not isinstance(right, str)
    wrong = replace(right, eps=2e-5)
    before = outputs_in_float64(net, state, (x,), {}, None)
    certificate = Certificate(net, (x,), {}, None, state, [right, wrong], before)
    assert certificate.held([right]) == ([right], [])
    assert certificate.held([wrong]) == ([], [wrong])


# --- gains ----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """A gain stored as its distance from 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, RMSNorm])
def test_folds_a_gain_into_all_its_readers(norm: type[nn.Module]) -> None:
    net = Net(
        lambda m, x: (lambda y: (m.q(y) * m.k(y)).softmax(-1) * m.v(y))(m.norm(x)),
        norm=norm(4), q=nn.Linear(4, 6), k=nn.Linear(4, 6, bias=False), v=nn.Linear(4, 6),
    )  # fmt: skip
    folded = check(shaken(net), torch.randn(2, 5, 4), gain=(1, 1))
    assert set(folded.report.folded[0].into) == {"q", "k", "v"}
    plain = 0.0 if norm is RMSNorm else 1.0
    assert torch.equal(folded.model.norm.weight, torch.full((4,), plain))


def test_folds_a_group_norm_into_a_convolution_with_its_shift() -> None:
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3, groups=2, bias=False))
    folded = check(shaken(net), torch.randn(2, 4, 6, 6), gain=(1, 1))
    assert folded.report.folded[0].note == ""
    assert torch.equal(folded.model[0].bias, torch.zeros(4))


def test_folds_the_scale_of_a_layer_into_the_map_behind_it() -> None:
    net = Net(lambda m, x: x + m.a(x) * m.gamma, a=nn.Linear(4, 4))
    net.gamma = nn.Parameter(torch.zeros(4))
    folded = check(shaken(net), torch.randn(3, 4), scale=(1, 1))
    assert torch.equal(folded.model.gamma, torch.ones(4))


# --- computed weights -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: parametrize(m, "wn"),
        lambda m: parametrize(m, "cwn"),
    ],
)
def test_computed_weights_become_plain(compute: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(compute(nn.Linear(4, 5)), nn.BatchNorm1d(5), nn.ReLU())
    folded = check(shaken(net), torch.randn(3, 4), weight=(1, 1), batchnorm=(1, 1))
    assert sorted(folded.model.state_dict()) == ["0.bias", "0.weight"]


# --- how it is asked for --------------------------------------------------------------------------


def small() -> nn.Sequential:
    """Return a small network with a norm."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return shaken(net)  # type: ignore[return-value]


def test_in_place_changes_the_model_itself() -> None:
    net, x = small(), torch.randn(2, 3, 6, 6)
    before = net(x)
    folded = osp.fold(net, x, inplace=True)
    assert folded.model is net
    assert isinstance(net[1], nn.Identity)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


def test_kept_modules_load_into_the_same_class() -> None:
    net, x = small(), torch.randn(2, 3, 6, 6)
    folded = fold(net, x, keep_modules=True)
    other = small()
    other.load_state_dict(folded.model.state_dict())
    torch.testing.assert_close(other(x), net(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(other[1].weight, torch.ones(4))
    assert "its shift stays in its own bias" in str(folded)


def test_only_what_is_asked_for() -> None:
    norms = nn.BatchNorm1d(4), nn.LayerNorm(4)
    net = shaken(nn.Sequential(nn.Linear(3, 4), *norms, nn.Linear(4, 2)))
    report = fold(net, torch.randn(5, 3), what="gain").report
    assert report.count("gain") == (1, 1)
    assert report.count("batchnorm") == (0, 0)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda net: net.train(), {}, "'1' is in training mode"),
        (lambda net: net[0].weight.data.fill_(float("nan")), {}, "'0.weight' holds NaN"),
        (lambda net: net.to("meta"), {}, "meta device"),
        (lambda net: net, {"what": "bachnorm"}, "did you mean 'batchnorm'"),
        (lambda net: net, {"tolerance": 1e-30}, "more than 1e-30, so the model is left"),
        (lambda net: net, {"args": torch.randn(2, 5, 6, 6)}, "module '0'"),
        (lambda net: net, {"args": None}, "give inputs"),
    ],
)
def test_bad_input_gets_one_line(change: Any, options: dict[str, Any], message: str) -> None:
    net = small()
    change(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(FoldError, match=message) as error:
        fold(net, **{"args": torch.randn(2, 3, 6, 6), "inplace": True, **options})
    assert "\n" not in str(error.value)
    after = net.state_dict()
    real = {n: t for n, t in before.items() if not t.is_meta}
    assert all(torch.equal(t, after[n]) or t.isnan().any() for n, t in real.items())


def test_a_library_model_saves_and_loads(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    net = shaken(transformers.ResNetForImageClassification(config))
    x = torch.randn(2, 3, 24, 24)
    folded = fold(net, x)
    assert folded.report.count("batchnorm") == (7, 7)
    folded.model.save_pretrained(tmp_path)
    loaded = type(net).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(x).logits, net(x).logits, rtol=1e-4, atol=1e-5)
