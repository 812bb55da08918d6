"""What every optimizer on spheres keeps, in every mode and on every path."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from onsphere.geometry import Sphere, VectorAxes
from optim.contract import MEMBERS, SCHEDULERS, feed, loss_of, target, train

ROWS = Sphere(VectorAxes((0,)))
HARD = [name for name, member in MEMBERS.items() if member.mode != "brake"]
pytestmark = pytest.mark.usefixtures("path")

members = pytest.mark.parametrize("name", MEMBERS)
on_spheres = pytest.mark.parametrize("name", HARD)


def start(name, generator, shape=(4, 6), sphere=ROWS, dtype=torch.float32, **settings):
    member = MEMBERS[name]
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    return member, weight, member.build([weight], sphere, **settings)


def norms(weight):
    return weight.detach().double().flatten(1).norm(dim=1)


@members
def test_decreases_at_once_and_converges(name, generator):
    member, weight, optimizer = start(name, generator, dtype=torch.float64)
    goal = target(generator, 4, 6).double()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.98**k)
    losses = train(member, weight, optimizer, goal, 400, scheduler.step)
    if not member.closure:  # LBFGS takes steps of its own size
        assert all(b < a for a, b in itertools.pairwise(losses[:4]))
    assert losses[-1] == pytest.approx(-4, abs=2e-3)


# dtype -> how far a length may be off, as a share of it
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}


def keeps_radius(name, steps, generator):
    """Take steps with weights of each dtype; one optimizer has them all, where it can."""
    member = MEMBERS[name]
    weights = [
        torch.nn.Parameter(torch.randn(3, 32, generator=generator).to(dtype)) for dtype in ROUNDING
    ]
    before = [norms(weight) for weight in weights]
    if member.closure:  # LBFGS makes no sense of gradients without a loss
        for weight in weights:
            optimizer = member.build([weight], ROWS)
            train(member, weight, optimizer, target(generator, 3, 32), 30)
    else:
        optimizer = member.build(weights, ROWS)
        for _ in range(steps // 500):
            for grad in torch.randn(500, 3, 32, generator=generator):
                for weight in weights:
                    weight.grad = grad.to(weight.dtype)
                optimizer.step()
    for weight, length, rounding in zip(weights, before, ROUNDING.values(), strict=True):
        assert (norms(weight) / length - 1).abs().max() < rounding, weight.dtype


@on_spheres
def test_radius_is_kept(name, generator):
    """In as many steps as a length shows that is off by a rounding more in each, at random."""
    keeps_radius(name, 500, generator)


@pytest.mark.slow
@on_spheres
def test_radius_is_kept_over_ten_thousand_steps(name, generator):
    keeps_radius(name, 10_000, generator)


@pytest.mark.parametrize("name", [n for n in MEMBERS if n not in HARD])
def test_the_brake_lets_nothing_grow(name, generator):
    member, weight, optimizer = start(name, generator)
    for grad in torch.randn(50, 4, 6, generator=generator):
        before = norms(weight)
        feed(member, weight, optimizer, grad)
        assert (norms(weight) <= before * (1 + 1e-6)).all()


@members
def test_the_gradient_is_not_touched(name, generator):
    member, weight, optimizer = start(name, generator)
    for grad in torch.randn(3, 4, 6, generator=generator):
        weight.grad = grad.clone()
        given = weight.grad
        optimizer.step((lambda: 0.0) if member.closure else None)
        assert weight.grad is given
        assert torch.equal(weight.grad, grad)


@members
def test_a_missing_gradient_moves_nothing(name, generator):
    member, weight, optimizer = start(name, generator)
    before = weight.detach().clone()
    feed(member, weight, optimizer, None)
    assert torch.equal(weight, before)


@on_spheres
def test_a_zero_gradient_at_first_moves_nothing(name, generator):
    member, weight, optimizer = start(name, generator)
    before = weight.detach().clone()
    feed(member, weight, optimizer, torch.zeros(4, 6))
    torch.testing.assert_close(weight.detach(), before, rtol=3e-7, atol=0)


@members
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_reported(name, bad, generator):
    member, weight, optimizer = start(name, generator)
    grads = torch.randn(3, 4, 6, generator=generator)
    feed(member, weight, optimizer, grads[0])
    before, poisoned = weight.detach().clone(), grads[1].clone()
    poisoned[:, 2] = bad
    with pytest.warns(UserWarning, match="left 4 vectors where they were"):
        feed(member, weight, optimizer, poisoned)
    torch.testing.assert_close(weight.detach(), before, rtol=2e-7, atol=0)
    assert optimizer.skipped == 4
    torch.testing.assert_close(weight.grad, poisoned, rtol=0, atol=0, equal_nan=True)
    feed(member, weight, optimizer, grads[2])  # and life goes on
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)


@members
def test_a_gradient_that_is_not_finite_can_be_an_error(name, generator):
    member, weight, optimizer = start(name, generator, nonfinite="raise")
    before = weight.detach().clone()
    with pytest.raises(FloatingPointError, match="no parameter was moved"):
        feed(member, weight, optimizer, torch.full((4, 6), torch.nan))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", [n for n in MEMBERS if n.startswith("Sphere")])
def test_a_moment_that_is_not_finite_stops_its_vector_alone(name, bad, path, generator):
    del path
    _, weight, optimizer = start(name, generator)
    grads = torch.randn(3, 4, 6, generator=generator)
    feed(MEMBERS[name], weight, optimizer, grads[0])
    state = optimizer.state[weight]
    for key in [k for k, t in state.items() if isinstance(t, torch.Tensor) and t.numel() == 24]:
        kept, before = state[key].clone(), weight.detach().clone()
        state[key][1, 2] = bad
        skipped = optimizer.skipped
        # As in AdamW, a coordinate whose second moment is infinite rests; the others go on.
        goes_on = key == "exp_avg_sq" and bad == float("inf")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            feed(MEMBERS[name], weight, optimizer, grads[1])
        assert optimizer.skipped == skipped + (not goes_on)
        assert (weight != before).any(1).tolist() == [True, goes_on, True, True]
        assert weight.isfinite().all()
        state[key][1] = kept[1]
        feed(MEMBERS[name], weight, optimizer, grads[2])
        assert not torch.equal(weight[1], before[1])


@on_spheres
def test_a_vector_of_length_zero_stays_and_is_reported(name, generator):
    member, weight, optimizer = start(name, generator)
    weight.data[1] = 0
    grads = torch.randn(3, 4, 6, generator=generator)
    with pytest.warns(UserWarning, match="left 1 vectors"):
        feed(member, weight, optimizer, *grads)
    assert not weight[1].any()
    assert weight[0].any()
    assert weight.isfinite().all()
    assert optimizer.skipped == 3


@members
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rate_zero_changes_nothing(name, dtype, generator):
    lr = 1e-45 if name == "hard Adafactor" else 0.0  # Adafactor refuses 0
    member, weight, optimizer = start(name, generator, dtype=dtype, lr=lr)
    before = weight.detach().clone()
    feed(member, weight, optimizer, *torch.randn(3, 4, 6, generator=generator).to(dtype))
    torch.testing.assert_close(weight.detach(), before, rtol=2e-7, atol=0)


@on_spheres
def test_vectors_of_one_entry_stay_and_that_is_said_once(name, generator):
    sphere = Sphere(VectorAxes((0, 1)))
    member, weight, optimizer = start(name, generator, sphere=sphere, lr=1e-3)
    before = weight.detach().clone()
    with pytest.warns(UserWarning, match="have one entry each") as told:
        feed(member, weight, optimizer, *torch.randn(3, 4, 6, generator=generator))
    assert len(told) == 1
    torch.testing.assert_close(weight.detach(), before, rtol=4e-7, atol=0)


@members
def test_memory_layouts_do_not_matter(name, generator):
    if MEMBERS[name].matrices:
        shape, places = (4, 6), [torch.clone, lambda x: x.T.contiguous().T]
    else:
        shape, places = (4, 3, 2, 2), [torch.clone]
        places.append(lambda x: x.clone(memory_format=torch.channels_last))
        if MEMBERS[name].gaps:
            places.append(lambda x: torch.stack([x, x], -1)[..., 0])
    if MEMBERS[name].closure:
        pytest.skip("LBFGS makes no sense of gradients without a loss")
    begin = torch.randn(shape, generator=generator)
    grads = 0.1 * torch.randn(3, *shape, generator=generator)  # no turns that amplify rounding
    ends = []
    for place in places:
        weight = torch.nn.Parameter(place(begin))
        optimizer = MEMBERS[name].build([weight], ROWS)
        feed(MEMBERS[name], weight, optimizer, *(place(g) for g in grads))
        ends.append(weight.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=2e-5, atol=2e-6)


@members
def test_global_hooks_run_once(name, generator):
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *given: calls.append(("before", given[0]))),
        register_optimizer_step_post_hook(lambda *given: calls.append(("after", given[0]))),
    ]
    try:
        member, weight, optimizer = start(name, generator)
        feed(member, weight, optimizer, *torch.randn(2, 4, 6, generator=generator))
        assert calls == [("before", optimizer), ("after", optimizer)] * 2
    finally:
        for handle in handles:
            handle.remove()
    feed(member, weight, optimizer, torch.randn(4, 6, generator=generator))
    assert len(calls) == 4


@on_spheres
def test_weights_that_start_at_zero_are_said_with_what_to_do(name, generator):
    sphere = Sphere(VectorAxes((0,)), radius=1.0)
    member, weight, optimizer = start(name, generator, sphere=sphere)
    weight.data.zero_()
    with pytest.warns(UserWarning, match="give them a start that is not 0"):
        feed(member, weight, optimizer, torch.randn(4, 6, generator=generator))
    assert not weight.any()
    assert optimizer.skipped == 4


@pytest.mark.filterwarnings("ignore:a parameter of shape:UserWarning")
@on_spheres
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0)], ids=str)
def test_tensors_with_nowhere_to_go(name, shape, generator):
    if MEMBERS[name].matrices and len(shape) != 2:
        pytest.skip("takes matrices only")
    if shape and name in ("hard Muon", "hard Adafactor", "hard LBFGS"):
        pytest.skip("the base optimizer does not take empty tensors")
    sphere = ROWS if shape else Sphere()
    member, weight, optimizer = start(name, generator, shape, sphere)
    before = weight.detach().clone()
    feed(member, weight, optimizer, torch.ones(shape))
    torch.testing.assert_close(weight.detach(), before, rtol=2e-7, atol=0)


@members
def test_tied_weights_move_once(name, generator):
    begin, grad = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    ends = []
    for count in (1, 2):
        layer = torch.nn.Linear(6, 4, bias=False)
        layer.weight = torch.nn.Parameter(begin.clone())
        model = torch.nn.ModuleList([layer] * count)
        optimizer = MEMBERS[name].build(list(model.parameters()), ROWS)
        feed(MEMBERS[name], layer.weight, optimizer, grad)
        ends.append(layer.weight.detach())
    assert torch.equal(*ends)


@members
def test_sparse_and_complex_are_refused(name, generator):
    member, weight, optimizer = start(name, generator)
    weight.grad = torch.eye(4, 6).to_sparse()
    with pytest.raises(RuntimeError, match="needs a dense gradient"):
        optimizer.step((lambda: 0.0) if member.closure else None)
    if not member.matrices and not member.closure:
        with pytest.raises(ValueError, match="view_as_real"):
            member.build([torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.complex64))], ROWS)


@members
def test_maximize(name, generator):
    if not MEMBERS[name].maximizes:
        pytest.skip("the base optimizer has no maximize")
    begin = torch.randn(4, 6, generator=generator)
    grads = 0.1 * torch.randn(3, 4, 6, generator=generator)  # no turns that amplify rounding
    ends = []
    for sign in (1, -1):
        weight = torch.nn.Parameter(begin.clone())
        optimizer = MEMBERS[name].build([weight], ROWS, maximize=sign < 0)
        feed(MEMBERS[name], weight, optimizer, *(sign * grads))
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@members
def test_the_rate_may_be_a_tensor(name, generator):
    if not MEMBERS[name].tensor_lr:
        pytest.skip("the base optimizer takes no tensor")
    begin = torch.randn(4, 6, generator=generator)
    grads = 0.1 * torch.randn(3, 4, 6, generator=generator)  # no turns that amplify rounding
    ends = []
    for kind in (float, torch.tensor):
        weight = torch.nn.Parameter(begin.clone())
        optimizer = MEMBERS[name].build([weight], ROWS, lr=kind(0.05))
        feed(MEMBERS[name], weight, optimizer, *grads)
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@members
def test_named_parameters(name, generator):
    member = MEMBERS[name]
    weight = torch.nn.Parameter(torch.randn(4, 6, generator=generator))
    optimizer = member.build([("layer.weight", weight)], ROWS)
    feed(member, weight, optimizer, torch.randn(4, 6, generator=generator))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["layer.weight"]


def through_a_file(member, weight, optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = torch.nn.Parameter(weight.detach().clone())
    fresh = member.build([copied], ROWS)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return copied, fresh


def through_pickle(member, weight, optimizer):
    fresh = pickle.loads(pickle.dumps(optimizer))
    return fresh.param_groups[0]["params"][0], fresh


def through_deepcopy(member, weight, optimizer):
    fresh = copy.deepcopy(optimizer)
    return fresh.param_groups[0]["params"][0], fresh


@members
@pytest.mark.parametrize("way", [through_a_file, through_pickle, through_deepcopy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_continues_bit_for_bit(name, way, dtype, generator):
    member, weight, optimizer = start(name, generator, dtype=dtype)
    if name == "hard LBFGS" and way is not through_a_file:
        pytest.skip("LBFGS itself forgets its parameters when pickled")
    feed(member, weight, optimizer, *torch.randn(3, 4, 6, generator=generator).to(dtype))
    again, resumed = way(member, weight, optimizer)
    for grad in torch.randn(4, 4, 6, generator=generator).to(dtype):
        feed(member, weight, optimizer, grad)
        feed(member, again, resumed, grad)
    assert again is not weight
    assert torch.equal(weight, again)
    assert resumed.skipped == optimizer.skipped


@members
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_set_the_rate_as_for_torch_sgd(name, make, generator, path):
    if path == "torch":
        pytest.skip("schedulers do not see the path")
    member, weight, ours = start(name, generator, lr=0.1)
    other = torch.nn.Parameter(torch.zeros(4, 6))
    theirs, rates = torch.optim.SGD([other], lr=0.1), ([], [])
    schedulers = make(ours), make(theirs)
    for grad in torch.randn(5, 4, 6, generator=generator):
        feed(member, weight, ours, grad)
        feed(MEMBERS["hard SGD"], other, theirs, grad)
        for seen, optimizer, scheduler in zip(rates, (ours, theirs), schedulers, strict=True):
            scheduler.step(*([1.0] if isinstance(scheduler, _PLATEAU) else []))
            seen.append(float(optimizer.param_groups[0]["lr"]))
    assert rates[0] == rates[1]


_PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau


@on_spheres
def test_weight_decay_on_a_sphere_warns_once(name, generator):
    if not MEMBERS[name].decays:
        pytest.skip("has no weight decay")
    with pytest.warns(UserWarning, match="does nothing to weights on a sphere") as told:
        member, weight, optimizer = start(name, generator, weight_decay=0.3)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(member, weight, optimizer, torch.randn(4, 6, generator=generator))


@members
def test_closures_hooks_and_added_groups(name, generator):
    member, weight, optimizer = start(name, generator)
    goal, calls = target(generator, 4, 6), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(weight, goal)
        loss.backward()
        calls.append("closure")
        return loss

    assert optimizer.step(closure) <= 4
    assert calls[0] == "pre"
    assert "closure" in calls
    assert calls[-1] == "post"
    if member.closure:
        return  # LBFGS has one group
    more = torch.nn.Parameter(torch.randn(2, 3, generator=generator))
    optimizer.add_param_group({"params": [more], "lr": 0.5, "sphere": ROWS})
    before = norms(more)
    more.grad = torch.randn(2, 3, generator=generator)
    optimizer.step()
    assert ((norms(more) / before) <= 1 + 1e-6).all()
    assert optimizer.param_groups[1]["lr"] == 0.5


@members
def test_a_gradient_scaler_skips_what_overflowed(name, generator):
    member, weight, optimizer = start(name, generator)
    if member.closure:
        pytest.skip("gradient scalers take no closure")
    scaler, before = torch.amp.GradScaler("cpu", init_scale=8.0), weight.detach().clone()
    scaler.scale(weight.sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, before)
    optimizer.zero_grad()
    scaler.scale(loss_of(weight, target(generator, 4, 6))).backward()
    scaler.step(optimizer)
    assert not torch.equal(weight, before)


@members
def test_everyone_is_an_optimizer(name, generator):
    _, _, optimizer = start(name, generator)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "lr" in repr(optimizer)
