"""SphereSGD: what it keeps, where it converges, and what it refuses."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereSGD

ROWS = Sphere(VectorAxes((0,)))
RETRACTIONS = ["projection", "exponential"]
SETTINGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.5, "maximize": True},
]


def draw(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def on_sphere(tensor, sphere=ROWS, **settings):
    weight = torch.nn.Parameter(tensor.clone())
    settings = {"lr_mode": "rate", **settings}
    return weight, SphereSGD([{"params": [weight], "sphere": sphere}], **settings)


def feed(weights, optimizer, *grads):
    """One step for each gradient."""
    for grad in grads:
        for weight in weights:
            weight.grad = grad.clone().to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("settings", [*SETTINGS, {"weight_decay": 0.1, "momentum": 0.9}], ids=str)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_ordinary_groups_are_torch_sgd_bit_for_bit(settings, lr, generator):
    start = draw(5, 3, generator=generator, dtype=torch.float32)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    grads = [draw(5, 3, generator=generator) for _ in range(5)]
    feed([ours], SphereSGD([ours], lr=lr, **settings), *grads)
    feed([theirs], torch.optim.SGD([theirs], lr=lr, fused=True, **settings), *grads)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_converges_to_the_least_eigenvector(retraction, settings, generator):
    matrix = draw(8, 8, generator=generator)
    matrix = matrix + matrix.T
    least = torch.linalg.eigvalsh(matrix)[0]
    w, optimizer = on_sphere(
        draw(1, 8, generator=generator), retraction=retraction, lr=0.05, **settings
    )
    losses = []
    for _ in range(600):
        optimizer.zero_grad()
        loss = (w @ matrix @ w.T).squeeze() / w.detach().square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] == pytest.approx(least.item(), abs=1e-10)
    if "momentum" not in settings:
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("radius", [None, 3.0])
def test_radius_is_kept_and_momentum_stays_tangent(retraction, dtype, radius, generator):
    start = draw(6, 2, 5, generator=generator).to(dtype)
    w, optimizer = on_sphere(
        start, Sphere(VectorAxes((0,)), radius), retraction=retraction, lr=0.1, momentum=0.9
    )
    goal = VectorAxes((0,)).norms(start).double() if radius is None else radius
    rounding = max(1e-6, 4 * torch.finfo(dtype).eps)
    for _ in range(500):
        feed([w], optimizer, draw(6, 2, 5, generator=generator))
        norms = w.detach().double().flatten(1).norm(dim=1)
        buffer = optimizer.state[w]["momentum_buffer"].double().flatten(1)
        radial = (w.detach().double().flatten(1) * buffer).sum(1) / norms / buffer.norm(dim=1)
        assert radial.abs().max() < rounding
    assert ((VectorAxes((0,)).norms(w.detach()) / goal) - 1).abs().max() < rounding


def test_radius_after_ten_thousand_steps(generator):
    w, optimizer = on_sphere(draw(4, 64, generator=generator).float(), lr=0.1, momentum=0.9)
    start = w.detach().double().norm(dim=1)
    feed([w], optimizer, *(draw(4, 64, generator=generator) for _ in range(10_000)))
    assert (w.detach().double().norm(dim=1) / start - 1).abs().max() < 1e-6


def scale_invariant(w, target):
    """A loss of the directions of the rows alone."""
    return ((w / w.norm(dim=1, keepdim=True) - target) ** 4).sum()


@pytest.mark.parametrize("factor", [1.0, 1.01], ids=["effective rate", "another rate"])
def test_plain_sgd_moves_directions_as_sphere_sgd_at_the_effective_rate(factor, generator):
    target = draw(1, 9, generator=generator)
    plain = (3 * draw(1, 9, generator=generator)).requires_grad_()
    sphere, optimizer = on_sphere(plain.detach(), Sphere(VectorAxes((0,)), 1.0), lr=1.0)
    sphere.data /= sphere.data.norm(dim=1, keepdim=True)
    for _ in range(100):
        optimizer.param_groups[0]["lr"] = factor * 0.3 / plain.detach().square().sum()
        optimizer.zero_grad()
        scale_invariant(sphere, target).backward()
        optimizer.step()
        (grad,) = torch.autograd.grad(scale_invariant(plain, target), plain)
        plain.data -= 0.3 * grad
    assert torch.allclose(plain / plain.norm(), sphere, rtol=0, atol=1e-12) == (factor == 1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_small_steps_do_not_depend_on_the_way_to_step(settings, generator):
    start, grads = draw(3, 7, generator=generator), draw(3, 3, 7, generator=generator)
    ends = []
    for retraction in RETRACTIONS:
        w, optimizer = on_sphere(start, retraction=retraction, lr=1e-3, **settings)
        feed([w], optimizer, *grads)
        ends.append(w.detach())
    gap = (ends[0] - ends[1]).abs().max()
    assert 0 < gap < 1e-6  # third order in lr, times the gradients' size


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_unusable_vectors_stay_and_are_counted(bad, retraction, generator):
    start = draw(4, 3, generator=generator).float()
    start[2] = 0
    w, optimizer = on_sphere(start, retraction=retraction, lr=0.1, momentum=0.9)
    grad = draw(4, 3, generator=generator)
    with pytest.warns(UserWarning, match="left 1 vectors where they were"):
        feed([w], optimizer, grad)
    before, momentum = w.detach().clone(), optimizer.state[w]["momentum_buffer"].clone()
    grad[1, 1] = bad
    feed([w], optimizer, grad)  # the warning was given: a second one would be an error
    kept = torch.tensor([False, True, True, False])
    assert torch.equal((w == before).all(1), kept)
    assert torch.equal((optimizer.state[w]["momentum_buffer"] == momentum).all(1), kept)
    assert optimizer.skipped == 3


def test_a_vector_that_comes_alive_keeps_the_length_it_then_has(generator):
    w, optimizer = on_sphere(torch.zeros(1, 3), lr=0.1)
    with pytest.warns(UserWarning, match="left 1"):
        feed([w], optimizer, torch.ones(1, 3))
    w.data.copy_(torch.tensor([[0.0, 2.0, 0.0]]))
    feed([w], optimizer, torch.ones(1, 3))
    assert w.detach().norm().item() == pytest.approx(2.0)


EDGES = {
    "0-d": (torch.tensor(-2.0), Sphere()),
    "empty": (torch.empty(0, 3), ROWS),
    "empty vectors": (torch.empty(3, 0), ROWS),
    "one entry per vector": (torch.tensor([[-2.0], [3.0]]), ROWS),
    "every entry a vector": (torch.tensor([[-2.0, 5.0]]), Sphere(VectorAxes((0, 1)))),
}


@pytest.mark.filterwarnings("ignore:a parameter of shape:UserWarning")
@pytest.mark.parametrize(("tensor", "sphere"), EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_tensors_with_nowhere_to_go(tensor, sphere, retraction):
    w, optimizer = on_sphere(tensor, sphere, retraction=retraction, lr=0.1, momentum=0.9)
    feed([w], optimizer, torch.full_like(w, 1e6), torch.full_like(w, -1e6))
    assert torch.equal(w, tensor)
    assert optimizer.skipped == 0


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_rate_zero_and_missing_gradient_move_nothing(lr, generator):
    w, optimizer = on_sphere(draw(4, 3, generator=generator), lr=lr, momentum=0.9)
    before = w.detach().clone()
    feed([w], optimizer, draw(4, 3, generator=generator))
    assert torch.allclose(w, before, rtol=1e-15)
    w.grad = None
    optimizer.step()
    assert torch.allclose(w, before, rtol=1e-15)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_memory_layout_does_not_matter_and_the_gradient_is_not_touched(
    settings, retraction, generator
):
    start, grad = (draw(4, 3, 5, 5, generator=generator) for _ in range(2))
    sphere = Sphere(VectorAxes(pieces=((0, 2),)))
    ends = []
    for place in (
        torch.Tensor.clone,
        lambda x: x.clone(memory_format=torch.channels_last),
        lambda x: x.mT.contiguous().mT,
    ):
        w = torch.nn.Parameter(place(start))
        optimizer = SphereSGD(
            [{"params": [w], "sphere": sphere}], lr=0.1, retraction=retraction, **settings
        )
        for _ in range(3):
            w.grad = place(grad)
            optimizer.step()
            assert torch.equal(w.grad, grad)
        ends.append(w.detach())
    assert torch.allclose(ends[0], ends[1], rtol=1e-13)
    assert torch.allclose(ends[0], ends[2], rtol=1e-13)


def through_a_file(optimizer, weight):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = torch.nn.Parameter(weight.detach().clone())
    fresh = SphereSGD([{"params": [copied], "sphere": None}], lr=99.0)
    with pytest.warns(UserWarning, match="the saved one is used"):
        fresh.load_state_dict(torch.load(file, weights_only=True))
    return copied, fresh


def through_pickle(optimizer, weight):
    fresh = pickle.loads(pickle.dumps(optimizer))
    return fresh.param_groups[0]["params"][0], fresh


def through_deepcopy(optimizer, weight):
    fresh = copy.deepcopy(optimizer)
    return fresh.param_groups[0]["params"][0], fresh


@pytest.mark.parametrize("way", [through_a_file, through_pickle, through_deepcopy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sphere", [ROWS, Sphere(VectorAxes((1,), ((0, 2),)), 2.0)], ids=str)
def test_a_resumed_run_continues_bit_for_bit(way, dtype, sphere, generator):
    w, optimizer = on_sphere(draw(4, 3, generator=generator).to(dtype), sphere, momentum=0.9)
    feed([w], optimizer, *draw(3, 4, 3, generator=generator))
    again, resumed = way(optimizer, w)
    grads = draw(5, 4, 3, generator=generator)
    feed([w], optimizer, *grads)
    feed([again], resumed, *grads)
    assert torch.equal(w, again)
    assert resumed.param_groups[0]["sphere"] == sphere
    assert torch.equal(resumed.state[again]["radius"], optimizer.state[w]["radius"])
    assert resumed.state[again]["radius"].dtype == torch.float32


def test_a_plain_run_is_taken_over_onto_the_sphere(generator):
    w, optimizer = on_sphere(draw(4, 3, generator=generator))
    plain = torch.optim.SGD([w], lr=0.5, momentum=0.9)
    feed([w], plain, draw(4, 3, generator=generator))
    optimizer.load_state_dict(plain.state_dict())
    norms = w.detach().norm(dim=1)
    feed([w], optimizer, draw(4, 3, generator=generator))
    assert torch.allclose(w.detach().norm(dim=1), norms)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_closure_hooks_and_added_groups(generator):
    w, optimizer = on_sphere(draw(4, 3, generator=generator), lr=0.1)
    bias = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [bias], "lr": 0.5})
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = w.pow(4).sum() + bias.sum()
        loss.backward()
        calls.append("closure")
        return loss

    assert optimizer.step(closure) > 0
    assert calls == ["pre", "closure", "post"]
    assert torch.equal(bias, torch.full((2,), 0.5))


def test_tied_weights_in_a_group_move_once(generator):
    start, grad = draw(2, 3, generator=generator), draw(2, 3, generator=generator)
    weight, optimizer = on_sphere(start, lr=0.1)
    tied = torch.nn.Linear(3, 2, bias=False)
    tied.weight = weight
    model = torch.nn.ModuleList([tied, tied])
    other = SphereSGD([{"params": model.parameters(), "sphere": ROWS}], lr=0.1)
    assert len(other.param_groups[0]["params"]) == 1
    feed([weight], optimizer, grad)
    assert not torch.equal(weight, start)


def test_weight_decay_on_a_sphere_warns_once_and_does_nothing(generator):
    start, grad = draw(2, 3, generator=generator), draw(2, 3, generator=generator)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(3)]
    groups = [{"params": [w], "sphere": ROWS} for w in weights[:2]]
    every = [*groups, {"params": weights[2:]}]
    with pytest.warns(UserWarning, match="does nothing to weights on a sphere") as told:
        decayed = SphereSGD(every, lr=0.1, weight_decay=0.5, lr_mode="rate")
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(weights, decayed, grad)
    free, optimizer = on_sphere(start, lr=0.1)
    feed([free], optimizer, grad)
    assert torch.equal(weights[0], free)
    assert torch.allclose(weights[2], start - 0.1 * (grad + 0.5 * start))


REFUSED = {
    "rate": ({"lr": -1.0}, {}, ValueError, "lr must be at least 0"),
    "rates": ({"lr": torch.ones(2)}, {}, ValueError, "lr is one number"),
    "momentum": ({"momentum": -0.1}, {}, ValueError, "momentum must be"),
    "decay": ({"weight_decay": float("nan")}, {}, ValueError, "weight_decay must be"),
    "nesterov": ({"nesterov": True}, {}, ValueError, "nesterov needs momentum > 0"),
    "retraction": ({"retraction": "jump"}, {}, ValueError, "got 'jump'"),
    "retraction of a group": ({}, {"retraction": "jump"}, ValueError, "got 'jump'"),
    "sphere": ({}, {"sphere": VectorAxes()}, TypeError, "Sphere or None"),
    "axes": ({}, {"sphere": Sphere(VectorAxes((5,)))}, ValueError, "parameter 0 of the group"),
    "complex": ({}, {"params": [torch.ones(2, 2, dtype=torch.complex64)]}, ValueError, "complex"),
}


@pytest.mark.parametrize(("settings", "group", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(settings, group, error, says):
    whole = {"params": [torch.zeros(2, 2)], "sphere": ROWS, **group}
    with pytest.raises(error, match=says):
        SphereSGD([whole], **settings)


def test_a_sparse_gradient_is_refused_on_a_sphere_and_fine_beside_it():
    w, optimizer = on_sphere(torch.ones(3, 2), lr=0.1)
    plain = torch.nn.Parameter(torch.ones(3, 2))
    optimizer.add_param_group({"params": [plain]})
    plain.grad = torch.eye(3, 2).to_sparse()
    optimizer.step()
    assert plain[0, 0].item() == pytest.approx(0.9)
    w.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="dense gradient"):
        optimizer.step()


def test_a_refused_group_leaves_nothing_behind():
    _, optimizer = on_sphere(torch.ones(3, 2))
    with pytest.raises(TypeError, match="Sphere or None"):
        optimizer.add_param_group({"params": [torch.ones(2)], "sphere": "rows"})
    assert len(optimizer.param_groups) == 1
