"""Fold and equalize on what people have: experts, heads that rest, shared memory, odd readers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import onsphere as osp
from onsphere.errors import OnsphereError
from onsphere.symmetry import EqualizeError, FoldError
from onsphere.symmetry.rewrite import verification
from onsphere.symmetry.rewrite.reach import unreached


class Experts(nn.Module):
    """Experts of which each token goes through one or two, behind a norm."""

    def __init__(self, count: int = 8, top: int = 2) -> None:
        super().__init__()
        self.first, self.norm, self.top = nn.Linear(5, 8), nn.LayerNorm(8), top
        self.router = nn.Linear(8, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what the chosen experts make."""
        h = self.norm(self.first(x))
        weights, chosen = self.router(h).softmax(-1).topk(self.top, -1)
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        for i in chosen.unique().tolist():
            out = out + (weights * (chosen == i)).sum(-1, keepdim=True) * self.experts[i](h)
        return out


class Heads(nn.Module):
    """Two heads of which one runs."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(5, 8), between
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        """Return what a head makes."""
        return self.heads[task](self.between(self.first(x)))


def shaken(net: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.LayerNorm):
                m.weight.normal_(generator=g)
                m.bias.normal_(generator=g)
    return net.eval()


def same(one: nn.Module, other: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(*inputs), other(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 4, 64])
def test_experts_that_no_token_reached_are_not_forgotten(tokens: int) -> None:
    torch.manual_seed(0)
    net = shaken(Experts())
    folded = osp.fold(net, torch.randn(tokens, 5))
    same(folded.model, net, torch.randn(500, 5))
    if unreached(net, (torch.randn(tokens, 5),), {}):
        (kept,) = [p for p in folded.report.kept if p.kind == "gain"]
        assert "these inputs do not reach experts." in kept.reason


@pytest.mark.parametrize("task", [0, 1])
def test_a_head_that_did_not_run_is_not_forgotten(task: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 5)
    net = shaken(Heads(nn.LayerNorm(8)))
    folded = osp.fold(net, x)
    same(folded.model, net, x, task)
    assert folded.report.kept[0].reason == (
        "these inputs do not reach heads.1.weight, which may read it: give inputs that do"
    )
    plain = Heads(nn.ReLU())
    done = osp.equalize(plain, x)
    same(done.model, plain, x, task)
    assert "these inputs do not reach heads.1.weight" in str(done)


def test_experts_of_a_library_that_are_read_slice_by_slice() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, experts_implementation="eager",
    )  # fmt: skip
    net = transformers.MixtralForCausalLM(config).eval()
    few, many = torch.randint(0, 50, (1, 4)), torch.randint(0, 50, (4, 32))
    done = osp.equalize(net, kwargs={"input_ids": few}, output=lambda r: r.logits)
    assert any("experts" in n for n in done.report.unreached)
    with torch.no_grad():
        torch.testing.assert_close(done.model(many).logits, net(many).logits, rtol=1e-4, atol=1e-5)


def test_views_of_one_memory_are_not_written_in_place() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(5, 8), nn.Linear(8, 5)
    last.weight = nn.Parameter(first.weight.data.t())
    net = shaken(nn.Sequential(first, nn.LayerNorm(8), last))
    x = torch.randn(6, 5)
    before = net(x)
    for rewrite, error in ((osp.fold, FoldError), (osp.equalize, EqualizeError)):
        with pytest.raises(error, match="views of the same memory"):
            rewrite(net, x, inplace=True)
        assert torch.equal(net(x), before)
    same(osp.fold(net, x).model, net, x)


def test_a_model_that_reads_what_a_norm_holds_keeps_it() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x.to(self.norm.weight.dtype)))

    x = torch.randn(4, 3, 6, 6)
    net = Casting()
    net(x)
    folded = osp.fold(net.eval(), x)
    assert isinstance(folded.model.norm, nn.BatchNorm2d)
    assert folded.report.count("batchnorm") == (1, 1)
    assert "the model reads what it holds" in folded.report.folded[0].note
    same(folded.model, net, x)


def test_fused_transformer_layers_run_afterwards() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    net = shaken(nn.Sequential(nn.Linear(8, 8), layer, nn.LayerNorm(8), nn.Linear(8, 3)))
    x = torch.randn(2, 5, 8)
    same(osp.fold(net, x).model, net, x)


@pytest.mark.parametrize("inputs", [4, 6])
def test_a_grouped_transposed_convolution_with_fewer_outputs(inputs: int) -> None:
    torch.manual_seed(0)
    groups = inputs // 2
    conv = nn.ConvTranspose2d(inputs, groups, 2, groups=groups)
    net = nn.Sequential(nn.Conv2d(4, inputs, 1), conv, nn.BatchNorm2d(groups))
    x = torch.randn(4, 4, 5, 5)
    net(x)
    folded = osp.fold(net.eval(), x)
    assert folded.report.count("batchnorm") == (1, 1)
    same(folded.model, net, x)


@pytest.mark.parametrize("look", [osp.audit, osp.equalize])
def test_the_given_model_keeps_its_buffers(look: Any) -> None:
    net = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)), nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(6, 4, 3)),
    )  # fmt: skip
    before = copy.deepcopy(net.state_dict())
    look(net, torch.randn(2, 3, 8, 8))
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("rewrite", [osp.fold, osp.equalize])
def test_what_cannot_be_verified_is_one_line(rewrite: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    for bad, words in ((x[:0], "is empty"), (x * torch.nan, "is NaN")):
        with pytest.raises(OnsphereError, match=words):
            rewrite(net, bad)
    for tolerance in ("a", -1.0, float("nan")):
        with pytest.raises(OnsphereError, match="tolerance is a number of 0 or more"):
            rewrite(net, x, tolerance=tolerance)
    net[0].weight.data[0, 0] = torch.inf
    with pytest.raises(OnsphereError, match="holds an infinite number"):
        rewrite(net, x)


def test_what_is_balanced_is_said_to_be() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    again = osp.equalize(osp.equalize(net, x).model, x)
    assert str(again) == "nothing to change: all balanced, of 1 families"


class Chaotic(nn.Sequential):
    """What doubles every difference sixty times: no rounding is small behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a point of the logistic map."""
        x = super().forward(x).sigmoid()
        for _ in range(60):
            x = 4 * x * (1 - x)
        return x


@pytest.mark.parametrize("rewrite", [osp.fold, osp.equalize])
def test_in_a_model_that_amplifies_rounding_nothing_is_changed(rewrite: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)]
    net = Chaotic(*(layers if rewrite is osp.fold else layers[::2] + layers[3:]))
    net(x)
    done = rewrite(net.eval(), x)
    assert torch.equal(done.model(x), net(x))
    assert done.report.change_in_float64 == 0


@pytest.mark.parametrize("rewrite", [osp.fold, osp.equalize])
def test_what_moves_in_float64_is_refused(rewrite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "IN_FLOAT64", 0.0)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    net(x)
    net = net.eval() if rewrite is osp.fold else net[::2].append(net[3])
    with pytest.raises(OnsphereError, match="in float64"):
        rewrite(net, x)


class UNet(nn.Module):
    """Two levels down and up again, with concatenations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.last = (self._block(*n) for n in ((3, 8), (8, 16), (16, 8)))
        self.up, self.head = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(8, 2, 1)

    @staticmethod
    def _block(narrow: int, wide: int) -> nn.Sequential:
        conv = nn.Conv2d(narrow, wide, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(wide), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of classes."""
        a = self.down(x)
        b = self.middle(nn.functional.max_pool2d(a, 2))
        return self.head(self.last(torch.cat([self.up(b), a], 1)))


def test_every_norm_of_a_u_net_is_folded() -> None:
    torch.manual_seed(0)
    net, x = UNet(), torch.randn(2, 3, 16, 16)
    net(x)
    folded = osp.fold(net.eval(), x)
    assert folded.report.count("batchnorm") == (3, 3)
    same(folded.model, net, torch.randn(1, 3, 32, 32))
