"""LayerNorm's centring into what writes its input, and weights that are computed in ``forward``."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onsphere as osp
from onsphere.symmetry import fold


class Block(nn.Module):
    """A residual block with its norm in front of its maps, or behind the sum."""

    def __init__(self, n: int, pre: bool) -> None:
        super().__init__()
        self.norm, self.pre = nn.LayerNorm(n), pre
        self.up, self.down = nn.Linear(n, 3 * n), nn.Linear(3 * n, n)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        if self.pre:
            return x + self.down(F.gelu(self.up(self.norm(x))))
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Decoder(nn.Module):
    """Embeddings, positions, blocks, a last norm and a head."""

    def __init__(self, n: int = 8, pre: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(20, n), nn.Parameter(torch.randn(5, n))
        self.blocks = nn.Sequential(Block(n, pre), Block(n, pre))
        self.last, self.head = nn.LayerNorm(n), nn.Linear(n, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.last(self.blocks(self.table(tokens) + self.positions)))


def made(**options: Any) -> Decoder:
    torch.manual_seed(0)
    net = Decoder(**options)
    for m in net.modules():
        if isinstance(m, nn.LayerNorm):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return net.eval()


TOKENS = torch.arange(15).reshape(3, 5)


def test_a_pre_norm_decoder_becomes_one_of_rms_norms() -> None:
    net = made()
    folded = fold(net, TOKENS)
    assert folded.report.count("centering") == (3, 3)
    assert folded.report.change_in_float64 < 1e-14
    norms = [m for m in folded.model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
    assert {type(m) for m in norms} == {nn.RMSNorm}
    assert {m.eps for m in norms} == {1e-5}
    other = torch.randint(0, 20, (4, 5))
    assert torch.allclose(folded.model.double()(other), net.double()(other), atol=1e-6)
    stream = folded.model.table(TOKENS) + folded.model.positions
    assert bool((stream.mean(-1).abs() < 1e-6).all())
    assert "blocks.0.norm becomes RMSNorm: means out of" in str(folded)


def test_what_was_folded_is_folded() -> None:
    folded = fold(made(), TOKENS).model
    again = fold(folded, TOKENS)
    assert again.report.count("centering") == (0, 0)
    pairs = zip(folded.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_in_place_is_the_same() -> None:
    net = made()
    there = copy.deepcopy(net)
    fold(there, TOKENS, inplace=True)
    assert isinstance(there.last, nn.RMSNorm)
    assert torch.allclose(there(TOKENS), net(TOKENS), atol=1e-5)
    assert there.state_dict().keys() == fold(net, TOKENS).model.state_dict().keys()


def test_classes_are_kept_where_asked() -> None:
    net = made()
    folded = fold(net, TOKENS, keep_modules=True)
    assert folded.model.state_dict().keys() == net.state_dict().keys()
    assert isinstance(folded.model.last, nn.LayerNorm)
    notes = [p.note for p in folded.report.folded if p.kind == "centering"]
    assert notes == ["its class stays, and centres nothing any more"] * 3


@pytest.mark.parametrize("options", [{"pre": False}, {"tied": True}], ids=["post-norm", "tied"])
def test_a_mean_that_others_read_stays(options: dict[str, bool]) -> None:
    net = made(**options)
    folded = fold(net, TOKENS)
    assert folded.report.count("centering") == (0, 3)
    assert torch.equal(folded.model.table.weight, net.table.weight)
    assert all("keeps a mean" in p.reason for p in folded.report.kept if p.kind == "centering")


def test_one_reader_without_centring_is_enough_to_refuse() -> None:
    net = made()
    net.last = nn.RMSNorm(8)
    assert fold(net, TOKENS).report.count("centering") == (0, 2)


def test_a_layer_norm_that_is_more_than_that_keeps_its_class() -> None:
    class Shifted(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1.0

    net = made()
    net.last = Shifted(8)
    folded = fold(net, TOKENS)
    assert isinstance(folded.model.last, Shifted)
    assert torch.allclose(folded.model(TOKENS), net(TOKENS), atol=1e-5)


# --- weights that are computed in forward ---------------------------------------------------------


class Standardized(nn.Conv2d):
    """A convolution with weight standardization, as libraries write it."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the standardized weight."""
        flat = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Padded(Standardized):
    """One that pads first."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve."""
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Routed(nn.Linear):
    """A weight that depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale the weight by the input."""
        return F.linear(x, self.weight * x.mean(), self.bias)


IMAGES = torch.rand(2, 3, 9, 9)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "bias": False},
        {"groups": 3, "dilation": 2},
        {"padding": "same"},
    ],
)
def test_weight_standardization_becomes_a_plain_weight(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Standardized(3, 6, 3, **options), nn.BatchNorm2d(6), nn.ReLU()).eval()
    net[1].running_var.uniform_(0.5, 2.0)
    folded = fold(net, IMAGES)
    assert type(folded.model[0]) is nn.Conv2d
    assert isinstance(folded.model[1], nn.Identity)
    assert folded.report.count("weight") == (1, 1)
    assert folded.report.change_in_float64 < 1e-14
    other = torch.randn(1, 3, 12, 12)
    assert torch.allclose(folded.model(other), net(other), atol=1e-5)
    fold(net, IMAGES, inplace=True)
    assert type(net[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("net", "x", "words"),
    [
        (nn.Sequential(Padded(3, 4, 3)), IMAGES, "more than one linear map"),
        (nn.Sequential(Routed(9, 4)), IMAGES, "depends on its input"),
    ],
)
def test_what_is_no_plain_map_is_refused(net: nn.Module, x: Tensor, words: str) -> None:
    folded = fold(net, x)
    assert words in folded.report.kept[0].reason
    assert type(folded.model[0]) is type(net[0])


def test_a_class_that_computes_its_weight_keeps_it_where_asked() -> None:
    net = nn.Sequential(Standardized(3, 4, 3))
    report = fold(net, IMAGES, keep_modules=True).report
    assert report.count("weight") == (0, 1)
    assert "would not load" in report.kept[0].reason


def test_a_subclass_that_computes_nothing_is_left_alone() -> None:
    class Plain(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    folded = osp.fold(nn.Sequential(Plain(3, 4, 3)), IMAGES)
    assert folded.report.count("weight") == (0, 0)
