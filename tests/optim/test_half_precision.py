"""Updates that are small beside the weights: in half precision most of a step is rounding."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

from onsphere.geometry import Sphere
from onsphere.optim import SphereAdamW, SphereSGD, kernels, on_sphere
from optim.table import OPTIMIZERS, ROWS, make

T = torch.optim
BASES = {
    "SGD": partial(T.SGD, momentum=0.9),
    "AdamW": T.AdamW,
    "AdamW fused": partial(T.AdamW, fused=True),
    "NAdam": T.NAdam,
    "RMSprop": T.RMSprop,
    "Adafactor": T.Adafactor,
    "Muon": T.Muon,
}


@pytest.fixture(params={"native": True, "torch": False}.items(), ids=lambda item: item[0])
def path(request):
    """Run a check on every path."""
    if request.param[1] and kernels.instruction_set() == "none":
        pytest.skip("the native kernels were not built")
    with kernels.switched(request.param[1]):
        yield request.param[0]


def turned_to(start, update, angle):
    """Turn rows towards an update by an angle, in float64."""
    p, u = start.double(), update.double()
    tangent = u - (u * p).sum(1, keepdim=True) / p.square().sum(1, keepdim=True) * p
    unit = tangent / tangent.norm(dim=1, keepdim=True)
    angle = torch.tensor(angle, dtype=torch.float64)
    return p * angle.cos() + unit * p.norm(dim=1, keepdim=True) * angle.sin()


@pytest.mark.filterwarnings("ignore:weights in torch.bfloat16 that turn:UserWarning")
@pytest.mark.filterwarnings("ignore:weight_decay=:UserWarning")
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("base", BASES)
def test_rotate_knows_the_update_in_bfloat16(base, lr, path, generator):
    """What it writes is the exact point, rounded; the update is what the base adds to nothing."""
    start = (torch.randn(8, 512, generator=generator) * 0.02).bfloat16()
    weight, nothing = (nn.Parameter(x) for x in (start.clone(), torch.zeros_like(start)))
    optimizer = on_sphere(BASES[base]([weight], lr=lr, weight_decay=0.1), {weight: ROWS}, "rotate")
    weight.grad = nothing.grad = torch.randn(8, 512, generator=generator).bfloat16()
    optimizer.step()
    BASES[base]([nothing], lr=lr, weight_decay=0.0).step()
    exact = turned_to(start, nothing.detach(), lr)
    differ = weight.detach() != exact.bfloat16()
    assert differ.float().mean() < 0.02  # ties, and sums in float32
    moved = weight.detach().double() - start.double()
    best = torch.cosine_similarity(
        exact.bfloat16().double() - start.double(), exact - start.double()
    )
    ours = torch.cosine_similarity(moved, exact - start.double())
    assert (ours > best - 0.01).all()
    assert lr < 1e-2 or (ours > 0.97).all()


@pytest.mark.filterwarnings("ignore:weight_decay=:UserWarning")
@pytest.mark.parametrize("base", BASES)
def test_decay_alone_turns_nothing(base, path, generator):
    start = torch.randn(200, 64, generator=generator) * 0.02
    weight = nn.Parameter(start.clone())
    optimizer = on_sphere(
        BASES[base]([weight], lr=1e-3, weight_decay=1e-2), {weight: ROWS}, "rotate"
    )
    for _ in range(50):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert torch.equal(weight, start)
    assert optimizer.skipped == 0


class Twice(T.Optimizer):
    """Half a step along the gradient where it is, and half along that at the new point."""

    steps_from_anywhere = True

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        for _ in range(2):
            closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"] / 2)


@pytest.mark.parametrize("gaps", [False, True])
def test_a_closure_sees_the_weights(gaps, generator):
    start = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    if gaps:
        start = torch.stack([start, start], -1)[..., 0]
    weight, seen = nn.Parameter(start), []
    optimizer = on_sphere(Twice([weight], lr=0.1), {weight: ROWS}, "rotate")

    def closure():
        seen.append(weight.detach().clone())
        weight.grad = seen[-1].sin()
        return 0.0

    before = start.clone()
    for _ in range(2):
        optimizer.step(closure)
        between = before - 0.05 * before.sin()
        torch.testing.assert_close(seen[-2], before, rtol=0, atol=0)
        torch.testing.assert_close(seen[-1], between, rtol=1e-15, atol=0)
        exact = turned_to(before, -before.sin() - between.sin(), 0.1)
        torch.testing.assert_close(weight.detach(), exact, rtol=1e-12, atol=1e-14)
        before = weight.detach().clone()


class Towards(T.Optimizer):
    """Moves weights to a place, wherever they are: the update depends on the weights."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        if self.param_groups[0]["lr"] > 1:
            raise RuntimeError("too far")
        for p in self.param_groups[0]["params"]:
            p.lerp_(torch.ones_like(p), self.param_groups[0]["lr"])


def test_an_optimizer_that_looks_at_the_weights_does_so(generator):
    start = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = on_sphere(Towards([weight], lr=0.1), {weight: ROWS}, "rotate")
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    exact = turned_to(start, 1 - start, 0.1)
    torch.testing.assert_close(weight.detach(), exact, rtol=1e-12, atol=1e-14)


def test_a_step_that_fails_leaves_the_weights(generator):
    class Failing(Towards):
        steps_from_anywhere = True

    weight = nn.Parameter(torch.randn(3, 5, generator=generator))
    before, place = weight.detach().clone(), weight.data_ptr()
    optimizer = on_sphere(Failing([weight], lr=2.0), {weight: ROWS}, "rotate")
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="too far"):
        optimizer.step()
    assert torch.equal(weight, before)
    assert weight.data_ptr() == place


@pytest.mark.filterwarnings("ignore:on_sphere left:UserWarning")
def test_what_a_step_leaves_does_not_come_back_later(path, generator):
    """A row that stayed where it was begins its next step with nothing added to it."""
    weights = [nn.Parameter(torch.randn(3, 5)) for _ in range(2)]
    weights[1].data.copy_(weights[0])
    optimizers = [on_sphere(T.SGD([w], lr=0.1), {w: ROWS}, "rotate") for w in weights]
    first, second = torch.randn(2, 3, 5, generator=generator)
    for weight, optimizer in zip(weights, optimizers, strict=True):
        kept = weight.detach()[1].clone()
        weight.data[1] = 0  # has no direction
        weight.grad = first.clone()
        if weight is weights[0]:
            optimizer.step()
        weight.data[0], weight.data[2] = kept, kept
        weight.data[1] = kept
        weight.grad = second.clone()
        optimizer.step()
    torch.testing.assert_close(weights[0][1:2], weights[1][1:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", [{}, {"lr_mode": "angle"}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_master_weights_are_the_run_in_float32(name, mode, dtype, path, generator):
    start = (torch.randn(8, 32, generator=generator)).to(dtype)
    half, full = (nn.Parameter(x) for x in (start.clone(), start.float()))
    ours = make(name, [{"params": [half], "sphere": ROWS}], lr=1e-4, master_weights=True, **mode)
    theirs = make(name, [{"params": [full], "sphere": ROWS}], lr=1e-4, **mode)
    for grad in torch.randn(20, 8, 32, generator=generator):
        half.grad, full.grad = grad.to(dtype), grad.to(dtype).float()
        ours.step()
        theirs.step()
    assert torch.equal(half, full.to(dtype))
    assert torch.equal(ours.state[half]["master"], full)
    again = nn.Parameter(half.detach().clone())
    resumed = make(
        name, [{"params": [again], "sphere": ROWS}], lr=1e-4, master_weights=True, **mode
    )
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(ours)
    twin = copied.param_groups[0]["params"][0]
    for grad in torch.randn(3, 8, 32, generator=generator).to(dtype):
        for weight, optimizer in ((half, ours), (again, resumed), (twin, copied)):
            weight.grad = grad.clone()
            optimizer.step()
    assert torch.equal(ours.state[half]["master"], resumed.state[again]["master"])
    assert torch.equal(half, again)
    assert torch.equal(half, twin)


def test_master_weights_go_where_they_are_not_needed(generator):
    weight = nn.Parameter(torch.randn(4, 8, generator=generator).bfloat16())
    groups = [{"params": [weight], "sphere": ROWS}]
    optimizer = SphereAdamW(groups, master_weights=True, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = None
    weight.data = weight.data.float()  # as model.float() does
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert "master" not in optimizer.state[weight]


def test_rotations_below_rounding_are_said_once(generator):
    grad = torch.randn(4, 64, generator=generator).bfloat16()

    def step(build, lr):
        weight = nn.Parameter(torch.randn(4, 64, generator=generator).bfloat16())
        optimizer = build(weight, lr)
        for _ in range(3):
            weight.grad = grad.clone()
            optimizer.step()

    def sphere(weight, lr, **settings):
        return SphereSGD(
            [{"params": [weight], "sphere": Sphere()}], lr=lr, lr_mode="angle", **settings
        )

    def wrapped(weight, lr):
        return on_sphere(T.SGD([weight], lr=lr), {weight: ROWS}, "rotate")

    for build, words in ((sphere, "Give master_weights=True"), (wrapped, "Give SphereAdamW or")):
        with pytest.warns(UserWarning, match=words) as told:
            step(build, 1e-3)
        assert len(told) == 1
        step(build, 1e-2)
        step(build, 0.0)
    step(partial(sphere, master_weights=True), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", [(SphereSGD, T.SGD), (SphereAdamW, T.AdamW)], ids=str)
def test_ordinary_weights_move_as_in_pytorch(kinds, dtype, generator):
    start = torch.randn(4, 64, generator=generator).to(dtype)
    weights = [nn.Parameter(start.clone()) for _ in kinds]
    settings = {"momentum": 0.9} if SphereSGD in kinds else {}
    optimizers = [kind([w], lr=0.1, **settings) for kind, w in zip(kinds, weights, strict=True)]
    for grad in torch.randn(3, 4, 64, generator=generator).to(dtype):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    assert not torch.equal(weights[0], start)
    torch.testing.assert_close(*weights, rtol=2e-2, atol=2e-2)
