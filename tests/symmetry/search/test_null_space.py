"""The search for further symmetries: beside buffers that a model writes, in front of roundings."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import onsphere as osp
from onsphere.symmetry.numeric.radial_derivatives import RadialRows, radial_rows
from onsphere.symmetry.search import null_space
from symmetry.mixed import mixed_case
from symmetry.oracle import given_to_audit


class Running(nn.Module):
    """Divides by a running scale, which it writes first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.third = nn.Linear(3, 3, bias=False)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.no_grad():
            self.scale.mul_(0.9).add_(0.1 * y.abs().mean())
        return self.third(self.second(torch.tanh(y / self.scale)).relu())


def test_a_buffer_that_moves_along_hides_nothing_from_the_search() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = osp.audit(Running(), torch.randn(3, 4))
    assert [set(v) for v in found.scale_symmetries] == [
        {"first.weight", "scale"},
        {"second.weight", "third.weight"},
    ]
    assert found.complete
    assert [limit.kind for limit in found.limits] == ["buffers"]


def test_what_a_rounding_hides_at_some_weights_is_no_sphere() -> None:
    """Keys over tokens that are nearly alike: few weights and inputs show their scale."""
    net, inputs = given_to_audit(mixed_case(10660583))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(24)
        for p in net.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=float(p.detach().std()))
    found = osp.audit(net, inputs, seed=24)
    assert {"body.pieces.1.q.weight": 1, "body.pieces.1.k.weight": -1} in found.scale_symmetries
    assert not [v for v in found.scale_symmetries if len(v) == 1]


class OfUnitDeterminant(nn.Module):
    """A large weight on a sphere, and a small one that only numbers show to be on one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(128, 128, bias=False), nn.LayerNorm(128)
        self.second, self.third = nn.Linear(128, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.third.weight
        weight = weight * torch.exp(-torch.linalg.slogdet(weight).logabsdet / 4)
        return self.second(self.norm(self.first(x)).tanh()).tanh() @ weight


def test_large_weights_on_spheres_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def noted(*args: Any, names: Sequence[str], **kwargs: Any) -> RadialRows:
        measured.append(tuple(names))
        return radial_rows(*args, names=names, **kwargs)

    monkeypatch.setattr(null_space, "radial_rows", noted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = osp.audit(OfUnitDeterminant(), torch.randn(3, 128))
    assert {"first.weight": 1} in found.scale_symmetries
    assert {"third.weight": 1} in found.scale_symmetries
    assert found.complete
    assert set(measured) == {
        ("norm.weight", "norm.bias", "second.weight", "second.bias", "third.weight")
    }


class Differences(nn.Module):
    """Of equal tokens that follow each other the difference is 0, and divided by its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.map = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.map(self.words(ids))
        size = y.pow(2).mean(-1, keepdim=True).sqrt()
        y = nn.functional.layer_norm(size.log() + y / size, (6,), eps=1e-60)
        return nn.functional.rms_norm(y[:, 1:] - y[:, :-1], (6,), eps=1e-60)


@pytest.mark.parametrize("seed", range(4))
def test_gradients_that_rounding_hides_do_not_deny_what_holds(seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = osp.audit(Differences(), torch.tensor([[0, 1, 2, 3, 1]]), seed=seed)
    alone = {"map.weight": 1, "map.bias": 1}
    assert alone in found.scale_symmetries


def test_the_nearest_of_some_codes_hides_what_is_smaller_than_a_step() -> None:
    net, inputs = given_to_audit(mixed_case(10684400))
    found = osp.audit(net, inputs)
    assert {"body.pieces.3.a.bias": 1} not in found.scale_symmetries
