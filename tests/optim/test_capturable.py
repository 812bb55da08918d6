"""Steps that a graph can record and replay: nothing that changes is a number in Python.

There is no CUDA graph without a GPU. What makes one possible is tested on the CPU: operations are
recorded and replayed, and on the meta device every look at a value is an error.
"""

import copy

import pytest
import torch
from torch import nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD, sphere_optimizer

ROWS = VectorAxes(index=(0,))
SPHERES = {
    "rows": Sphere(ROWS),
    "given": Sphere(ROWS, radius=2.0),
    "centered": Sphere(ROWS, centered=True),
    "joint": Sphere(ROWS, joint=True),
}
KINDS = {
    "sgd": (SphereSGD, {"momentum": 0.9}),
    "nesterov": (SphereSGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (SphereAdamW, {}),
    "adamw per vector": (SphereAdamW, {"second_moment": "vector"}),
}
MODES = [
    {"lr_mode": mode, "retraction": retraction}
    for mode in ("relative", "rate", "angle")
    for retraction in ("projection", "exponential")
]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_sphere = pytest.mark.parametrize("sphere", SPHERES)
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(m.values()))


def made(kind, sphere, params, **settings):
    make, usual = KINDS[kind]
    groups = [{"params": params, "sphere": SPHERES[sphere]}]
    return make(groups, **{"lr": 0.02, **usual, **settings})


def stepped(optimizer, params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()


def weights(generator, dtype=torch.float64):
    return [nn.Parameter(torch.randn(4, n, generator=generator, dtype=dtype)) for n in (5, 3)]


@every_kind
@every_sphere
@every_mode
def test_a_capturable_step_is_the_same_step(kind, sphere, mode, generator):
    mine = weights(generator)
    theirs = copy.deepcopy(mine)
    settings = {**mode, "maximize": sphere == "rows"}
    first = made(kind, sphere, mine, capturable=True, **settings)
    second = made(kind, sphere, theirs, **settings)
    for number in range(8):
        grads = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in mine]
        grads[0][1] = 0 if number > 4 else grads[0][1]
        stepped(first, mine, grads)
        stepped(second, theirs, grads)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


def recorded(step, *given):
    """Take the step, and return what it did as a graph.

    One fake mode describes all its tensors; left to itself, ``make_fx`` makes one for each.
    """
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(step)(*given)


@every_kind
@every_mode
def test_a_recorded_step_replays_what_steps_would_do(kind, mode, generator):
    """Step count, corrections and rate go on from replay to replay."""
    mine = weights(generator)
    theirs = copy.deepcopy(mine)
    rate = torch.tensor(0.02, dtype=torch.float64)
    optimizer = made(kind, "rows", mine, lr=rate, capturable=True, **mode)
    expected = made(kind, "rows", theirs, **mode)

    def drawn():
        return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in mine]

    def step(*grads):
        for param, grad in zip(mine, grads, strict=True):
            param.grad = grad
        optimizer.step()
        return [p.detach() for p in mine]

    grads = drawn()
    stepped(optimizer, mine, grads)  # state is made before anything is recorded
    stepped(expected, theirs, grads)
    grads = drawn()
    replay = recorded(step, *grads)
    stepped(expected, theirs, grads)
    for lr in (0.02, 0.01, 0.3, 0.0, 0.05):
        grads = drawn()
        rate.fill_(lr)
        expected.param_groups[0]["lr"] = lr
        with torch.no_grad():
            replay(*grads)
        stepped(expected, theirs, grads)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    assert optimizer.skipped == expected.skipped


@every_kind
@every_sphere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_value_is_asked_of_the_device(kind, sphere, dtype, monkeypatch):
    """Tensors on the meta device have none, and mixing them with others is an error."""
    monkeypatch.setattr(sphere_optimizer, "_is_capturing", lambda: True)
    params = [nn.Parameter(torch.ones(4, n, dtype=dtype, device="meta")) for n in (5, 3)]
    optimizer = made(kind, sphere, params, capturable=True, master_weights=True)
    for param in params:
        param.grad = torch.ones_like(param)
    for rate in (0.1, torch.full((), 0.1, device="meta")):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.step()
    held = [x for own in optimizer.state.values() for x in own.values()]
    assert {x.device.type for x in held} == {"meta"}


def test_a_step_that_is_not_capturable_is_refused_while_a_graph_is_recorded(monkeypatch):
    monkeypatch.setattr(sphere_optimizer, "_is_capturing", lambda: True)
    weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="Give capturable=True"):
        made("sgd", "rows", [weight]).step()


def test_a_state_goes_to_a_capturable_run_and_back(generator):
    grads = [torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (5, 3)]
    start = weights(generator)
    runs = []
    for capturable in (True, False):
        params = copy.deepcopy(start)
        optimizer = made("adamw", "rows", params, capturable=capturable)
        for _ in range(3):
            stepped(optimizer, params, grads)
        other = made("adamw", "rows", params, capturable=not capturable)
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["capturable"] is capturable  # as in torch.optim
        other.param_groups[0]["capturable"] = not capturable
        stepped(other, params, grads)
        runs.append(params)
    torch.testing.assert_close(*runs, rtol=1e-6, atol=0)
