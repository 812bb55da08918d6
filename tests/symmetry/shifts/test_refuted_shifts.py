"""Shifts that structure alone once claimed and that change the function: none may be claimed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import onsphere as osp


class Small(nn.Module):
    def __init__(self, of: Callable[["Small", Tensor], Tensor]) -> None:
        super().__init__()
        self.W, self.V = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.b, self.c = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.k, self.one = nn.Linear(4, 4), nn.Parameter(torch.tensor(0.7))
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, x)


def into_whole(s: Small, x: Tensor) -> Tensor:
    h = x @ s.W + s.b
    q = torch.empty(h.shape, dtype=torch.int8, device=h.device)
    return q.copy_(h * 4).to(x.dtype) * s.c


def transposed(s: Small, x: Tensor) -> Tensor:
    h = (x @ s.W + s.b).reshape(-1, 4, 1, 1).expand(-1, 4, 2, 2)
    filters = s.V.reshape(4, 4, 1, 1)
    return F.conv_transpose2d(h, filters, s.c, stride=2, output_padding=1).tanh()


CASES: dict[str, Callable[[Small, Tensor], Tensor]] = {
    "factors -1 and -2": lambda s, x: (
        (x.tanh() + s.b) @ (s.W * -1.0) - ((2 * x).tanh() + s.b) @ (s.W * -2.0) + s.c
    ).tanh(),
    "softmax along -1 and -2": lambda s, x: (
        (x.tanh() + s.b) @ s.W.softmax(-1) - ((2 * x).tanh() + s.b) @ s.W.softmax(-2) + s.c
    ).tanh(),
    "a rounded weight": lambda s, x: (
        (x.tanh() + s.b) @ s.W - ((2 * x).tanh() + s.b) @ s.W.to(torch.int8).to(x.dtype) + s.c
    ).tanh(),
    "a mask of attention weights": lambda s, x: (
        (x @ x.mT).softmax(-1).bool().to(x.dtype) @ (x @ s.V + s.b) @ s.W + s.c
    ).tanh(),
    "into whole numbers": into_whole,
    "between strides": transposed,
    "filled": lambda s, x: x.tanh() * torch.zeros(4, device=x.device).fill_(s.one),
    "real and imaginary": lambda s, x: (
        F.layer_norm(torch.view_as_real((x @ s.W + s.b).to(torch.complex64)), (2,)).tanh() @ s.V[:2]
    ),
    "bits": lambda s, x: ((x @ s.W + s.b).view(torch.int32) & -65536).view(torch.float32) * s.c,
}


WITH_ANOTHER = {"factors -1 and -2", "softmax along -1 and -2", "a rounded weight"}
"""Where the bias can move, but not alone: the last one moves along."""


@pytest.mark.parametrize("meta", [False, True], ids=["with memory", "on meta"])
@pytest.mark.parametrize("name", CASES)
def test_no_shift_of_the_bias_is_claimed(name: str, meta: bool) -> None:
    torch.manual_seed(0)
    net = Small(CASES[name]).eval()
    with torch.no_grad():
        net.W.mul_(3)
    x = torch.randn(3, 4)
    found = osp.audit(net.to("meta") if meta else net, x)
    moving = {"one"} if name == "filled" else {"b"}
    assert not moving & {*found.inert}
    together = name in WITH_ANOTHER
    assert any(set(f.names) > moving for f in found.shift_families) == together
    assert all(set(f.names) != moving for f in found.shift_families)
    if found.shift_families and not meta:
        twin = osp.symmetry.shifted(net.double(), osp.audit(net, x.double()), size=0.1)
        assert torch.allclose(twin(x.double()), net(x.double()), atol=1e-9)


def test_families_can_be_given_one_by_one_and_bad_input_is_told() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 3)
    found = osp.audit(net, x)
    (family,) = found.shift_families
    for given in (family, [family], iter([family])):
        assert torch.allclose(osp.symmetry.shifted(net, found, given)(x), net(x), atol=1e-4)
    with pytest.raises(osp.symmetry.ShiftError, match="no family is given"):
        osp.symmetry.shifted(net, found, [])
    with pytest.raises(osp.symmetry.ShiftError, match="finite number, got nan"):
        osp.symmetry.shifted(net, found, size=float("nan"))


def test_families_do_not_depend_on_the_memory_format() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)).eval()
    images = torch.randn(2, 3, 8, 8)
    plain = osp.audit(net, images)
    last = osp.audit(net.to(memory_format=torch.channels_last), images)
    assert [f.names for f in last.shift_families] == [f.names for f in plain.shift_families]
    assert len(plain.shift_families) > 1
