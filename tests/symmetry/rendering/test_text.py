"""What an audit prints of models that are easy to describe wrongly."""

import pytest
import torch
from torch import Tensor, nn

import onsphere as osp
from onsphere.symmetry import Audit


class GroupedQueries(nn.Module):
    """Two heads of queries share one of keys; rotary positions turn neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 32, bias=False)
        self.k = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k))
        k = self._turned(k).repeat_interleave(2, dim=1)
        return (self._turned(q) @ k.transpose(-1, -2)).softmax(-1)

    def _turned(self, t: Tensor) -> Tensor:
        angle = torch.arange(t.shape[-2], dtype=t.dtype)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0])
        a, b = t[..., ::2], t[..., 1::2]
        turned = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return torch.stack(turned, -1).flatten(-2)


def test_rows_of_one_channel_that_are_no_neighbours_are_named() -> None:
    torch.manual_seed(0)
    found = osp.audit(GroupedQueries(), torch.randn(2, 5, 16))
    line = "q.weight groups of 4 rows (as 0, 1, 8, 9) * a, k.weight pairs of rows / a, for each of"
    assert line in str(found)


def test_output_channels_of_a_transposed_convolution_are_filters(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ConvTranspose2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), nn.ReLU(),
        nn.Conv2d(4, 2, 3),
    )  # fmt: skip
    found = osp.audit(net, torch.randn(2, 3, 6, 6))
    by_channel = str(found).partition("RESCALING BY CHANNEL")[2].partition("WEIGHT DECAY")[0]
    assert "0.weight filters * a, 0.bias entries * a, 2.weight channels / a" in by_channel
    assert "2.weight filters * a, 2.bias entries * a, 4.weight channels / a" in by_channel
    held = str(found.fixed_scales(net, granularity="vector"))
    assert "per input channel: {2,4}.weight" in held
    assert str(Audit.from_json(found.to_json(tmp_path / "audit.json"))) == str(found)


@pytest.mark.parametrize("squash", [nn.Sigmoid(), nn.Tanh()])
def test_nothing_is_said_of_symmetries_where_there_are_none(squash: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), squash, nn.Linear(4, 2))
    found = osp.audit(net, torch.randn(6, 3))
    assert (found.scale_symmetries, found.families) == ([], [])
    assert "e+00" not in str(found)
    assert "fixed_scales" not in str(found)
    assert "Certified" not in str(found)
    with pytest.warns(UserWarning, match="no scale of it is free at all") as told:
        found.param_groups(net)
    assert "maximal" not in str(told[0].message)


def test_in_evaluation_mode_buffers_that_move_along_are_named(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 3, 3)
    )
    net(1 + torch.randn(8, 2, 8, 8))  # a running mean that is not 0
    x = torch.randn(4, 2, 8, 8)
    said = str(osp.audit(net.eval(), x))
    first = said.splitlines()[2]
    assert first.startswith(
        "In evaluation mode running statistics are numbers like weights that tr"
    )
    assert said.count("In evaluation mode") == 1
    _, _, listed = said.partition("TOGETHER WITH BUFFERS, which do not train: ")
    assert listed.splitlines()[:3] == [
        "scaling all at once changes nothing (2)",
        "  0.weight, 1.running_mean, 1.running_var * a^2: per filter",
        "  1: weight, running_var * a^2: per entry",
    ]
    assert "on a joint sphere" not in said
    assert max(map(len, said.splitlines())) <= 100
    page = osp.audit(net, x).to_html(tmp_path / "audit.html").read_text()
    assert "scale-invariant together with buffers" in page
    assert "In evaluation mode" not in str(osp.audit(net.train(), x))
