"""The run in float64: gradients that are dropped one by one, and grouped convolutions."""

import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry import audit
from onsphere.symmetry.exact.trace import trace
from onsphere.symmetry.numeric.probe import Probe
from onsphere.symmetry.numeric.radial_derivatives import radial_rows


class _ChannelsLast(nn.Module):
    """A grouped convolution between operations that look at the order of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pairs = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(x.to(memory_format=torch.channels_last))
        x = x.permute(0, 2, 3, 1).view(len(x), -1, 6)  # works on channels last alone
        x = self.norm(x).unflatten(1, (5, 5)).permute(0, 3, 1, 2)
        return self.pairs(x)


def _probe(model: nn.Module, x: Tensor) -> Probe:
    return Probe(model, (x,), {}, trace(model, (x,)))


def test_grouped_convolutions_give_what_the_model_gives_in_its_order_of_memory() -> None:
    torch.manual_seed(0)
    model, x = _ChannelsLast(), torch.randn(2, 6, 5, 5)
    probe = _probe(model, x)
    (ours,) = probe.outputs(probe.given(), real_eps=True)
    own = model.double()(x.double())
    torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-12)
    assert ours.stride() == own.stride()
    probe.generator.manual_seed(3)
    (found,) = probe.gradients(probe.given(), 1, real_eps=True)
    probe.generator.manual_seed(3)
    cotangent = torch.randn(own.numel(), generator=probe.generator, dtype=torch.float64)
    wanted = torch.autograd.grad(own, list(model.parameters()), cotangent.view(own.shape))
    for (name, _), g in zip(model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(found.by_name[name], g, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
def test_a_huge_model_shows_the_same_gradients_one_by_one(tied: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    if tied:
        model[3].weight = model[0].weight
    probe = _probe(model, torch.randn(5, 4))
    state = probe.generator.get_state()
    together = radial_rows(probe, probe.given(), 2)
    probe.generator.set_state(state)
    probe.huge = True
    alone = radial_rows(probe, probe.given(), 2)
    torch.testing.assert_close(alone.values, together.values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(alone.bounds, together.bounds, rtol=1e-12, atol=1e-14)
    assert bool((alone.bounds[:, alone.names.index("0.weight")] > 0).all())
    torch.testing.assert_close(alone.outputs, together.outputs)
    assert all(p.grad is None for p in model.parameters())


def test_complex_outputs_are_combined_as_real_ones() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w / self.w.abs().square().sum().sqrt()

    torch.manual_seed(0)
    probe = _probe(Complex(), torch.randn(4, 3))
    rows = radial_rows(probe, probe.given(), 3)
    assert bool((rows.bounds > 0).all())
    assert bool((rows.values.abs() <= 1e-12 * rows.bounds).all())


class PaddingThroughRoots(nn.Module):
    """What a padding row of zeros makes is as large as an eps, so that the last norm shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=0)
        self.first, self.second = (nn.LayerNorm(6, eps=1e-60) for _ in range(2))
        self.out, self.last = nn.Linear(6, 6, bias=False), nn.RMSNorm(6, eps=1e-60)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.table(ids))
        halves = torch.cat([x[..., :3], (x[..., 3:].abs() + 1e-200).sqrt() ** 2], -1)
        return self.last(self.out(self.second(halves)))


def test_weights_at_which_several_eps_show_together_refute_nothing() -> None:
    torch.manual_seed(0)
    found = audit(PaddingThroughRoots().double(), torch.tensor([[0, 3, 5], [2, 0, 7]]))
    assert ("out.weight",) in [s.names for s in found.spheres]
