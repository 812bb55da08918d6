"""Effective rates and angular updates: against steps that are really taken."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereSGD
from onsphere.symmetry import audit
from onsphere.symmetry.angular_updates import next_angles
from onsphere.symmetry.claims import Kind


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
        ).double()


@pytest.fixture(scope="module")
def found():
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return audit(network(), x)


def angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = (t / t.norm(dim=1, keepdim=True) for t in (a, b))
    return 2 * torch.asin((a - b).norm(dim=1) / 2)


def on_rows(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    """Put the first weight on spheres, row by row."""
    first, *rest = parameters
    return [
        {"params": [first], "sphere": Sphere(VectorAxes((0,)))},
        {"params": rest, "sphere": None},
    ]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum, decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "sphere": lambda p: SphereSGD(on_rows(list(p)), lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("steps", [0, 3])
def test_the_angle_is_that_of_the_step_that_follows(found, make, steps, generator):
    net = network()
    optimizer = make(net.parameters())

    def gradients():
        optimizer.zero_grad()
        net(torch.randn(9, 6, generator=generator, dtype=torch.float64)).square().sum().backward()

    for _ in range(steps):
        gradients()
        optimizer.step()
    gradients()
    before = copy.deepcopy(net.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    report = next(r for r in found.weight_reports(net, optimizer) if r.name == "0.weight")
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert str(optimizer.state_dict()) == str(state)
    optimizer.step()
    turned = angles(before["0.weight"], net[0].weight.detach())
    assert report.vectors == 5
    assert report.angular_update.least == pytest.approx(float(turned.min()), rel=1e-9)
    assert report.angular_update.median == pytest.approx(float(turned.median()), rel=1e-9)
    assert report.angular_update.most == pytest.approx(float(turned.max()), rel=1e-9)


def test_plain_descent_turns_as_the_theory_says(found, generator):
    net = network()
    net(torch.randn(9, 6, generator=generator, dtype=torch.float64)).square().sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    report = found.weight_reports(net, optimizer)[0]
    w, g = net[0].weight.detach(), net[0].weight.grad
    assert report.kind is Kind.SPHERE
    assert report.norm == pytest.approx(float(w.norm()))
    lengths = w.norm(dim=1)
    expected = torch.atan(0.3 * g.norm(dim=1) / lengths)  # the gradient is tangent, up to eps
    assert report.angular_update.most == pytest.approx(float(expected.max()), rel=1e-3)
    assert report.effective_rate.most == pytest.approx(0.3 / float(lengths.min()) ** 2)
    adam = found.weight_reports(net, torch.optim.AdamW(net.parameters(), lr=0.3))[0]
    assert adam.effective_rate.most == pytest.approx(0.3 / float(lengths.min()))


def test_nothing_is_made_up(found):
    net = network()
    report = found.weight_reports(net)[0]
    assert report.effective_rate is None
    assert report.angular_update is None
    off = next(r for r in found.weight_reports(net) if r.name == "3.weight")
    assert (off.vectors, off.lengths) == (0, None)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    sphere = found.weight_reports(net, SphereSGD(net.parameters(), lr=0.1))[0]
    assert sphere.effective_rate is None
    with pytest.warns(UserWarning, match="LBFGS cannot be rehearsed"):
        assert (
            found.weight_reports(net, torch.optim.LBFGS(net.parameters()))[0].angular_update is None
        )


def test_a_zero_vector_and_half_a_turn():
    w = nn.Parameter(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    w.grad = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = next_angles(torch.optim.SGD([w], lr=1.0), {w: VectorAxes(index=(0,))})[w]
    assert found.tolist() == pytest.approx([0.0, math.pi, 0.0])


def test_a_complex_weight_turns_as_its_parts_do():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[3.0 + 4.0j, 0.0]]))

        def forward(self, x):
            y = torch.view_as_real(x.to(torch.complex64) @ self.weight.T).flatten(1)
            return nn.functional.rms_norm(y, (2,), eps=1e-9)

    net = Net()
    found = audit(net, torch.eye(2))
    net.weight.grad = torch.tensor([[-4.0 + 3.0j, 0.0]])  # i times the weight: orthogonal to it
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    (report,) = found.weight_reports(net, optimizer)
    assert report.norm == pytest.approx(5)
    assert report.angular_update.median == pytest.approx(math.atan(1))
    with pytest.warns(UserWarning, match="no weight"):
        assert found.spheres_of(net) == {}  # sphere optimizers take real weights
