"""What PyTorch's own tests ask of an optimizer, asked of those on spheres.

PyTorch's suite (``test/test_optim.py`` and the table of its optimizers) says what every optimizer
does with groups, rates, states, hooks and odd tensors. These are the same questions in our words.
"""

import contextlib
import copy
import functools
import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.nn import Parameter

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD, on_sphere
from optim.contract import SCHEDULERS

T = torch.optim
PLACES = {"rows": Sphere(VectorAxes((0,))), "whole": Sphere(), "joint": Sphere(joint=True)}
SHAPES = ((4, 6), (4, 3))
# What an optimizer of PyTorch says of these is not this suite's affair.
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=.* does nothing:UserWarning")


@dataclass(frozen=True)
class Kind:
    """One optimizer in one place: ``mode`` of ``on_sphere``, or none for our own classes."""

    make: partial
    sphere: Sphere | None
    mode: str | None = None

    def build(self, given, **settings):
        """Build it for tensors, names with tensors, or groups of them, all in this place."""
        if self.mode == "rotate":  # the rate is an angle
            settings = {"lr": 0.02, **settings}
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        if self.mode is None:
            return self.make([{**g, "sphere": self.sphere} for g in groups], **settings)
        base = self.make([dict(g) for g in groups], **settings)
        spheres = [{"params": g["params"], "sphere": self.sphere} for g in base.param_groups]
        return on_sphere(base, spheres, self.mode)

    @property
    def takes(self):
        """The names of the settings of a group."""
        return self.build([Parameter(torch.ones(2, 2))]).param_groups[0].keys()


SGD = partial(SphereSGD, lr=0.05, momentum=0.9)
ADAMW = partial(SphereAdamW, lr=0.05, weight_decay=0.0)
OURS = {
    f"{name}, {place}": Kind(make, {**PLACES, "ordinary": None}[place])
    for name, make in (("SphereSGD", SGD), ("SphereAdamW", ADAMW))
    for place in (*PLACES, "ordinary")
}
# Every optimizer of PyTorch but LBFGS (its closures are in the contract) and SparseAdam.
BASES = {
    "SGD": partial(T.SGD, lr=0.05, momentum=0.9),
    "AdamW": partial(T.AdamW, lr=0.05, weight_decay=0.0),
    "Adam": partial(T.Adam, lr=0.05, amsgrad=True),
    "RMSprop": partial(T.RMSprop, lr=0.05, momentum=0.9, centered=True),
    "Adagrad": partial(T.Adagrad, lr=0.05),
    "Adadelta": partial(T.Adadelta, lr=0.5),
    "Adamax": partial(T.Adamax, lr=0.05),
    "ASGD": partial(T.ASGD, lr=0.05),
    "NAdam": partial(T.NAdam, lr=0.05),
    "RAdam": partial(T.RAdam, lr=0.05),
    "Rprop": partial(T.Rprop, lr=0.05),
    "Adafactor": partial(T.Adafactor, lr=0.05),
    "Muon": partial(T.Muon, lr=0.05, weight_decay=0.0),
}
KINDS = {
    **OURS,
    "hard SGD, joint": Kind(BASES["SGD"], PLACES["joint"], "hard"),
    **{
        f"{mode} {base}": Kind(BASES[base], PLACES["rows"], mode)
        for mode in ("hard", "brake", "rotate")
        for base in ("SGD", "AdamW")
    },
}
ALL = {
    **KINDS,
    **{
        f"{mode} {base}": Kind(make, PLACES["rows"], mode)
        for mode in ("hard", "brake", "rotate")
        for base, make in BASES.items()
    },
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_kind = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)


def weights(generator, dtype=torch.float32, shapes=SHAPES):
    return [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def twins(params):
    return [Parameter(p.detach().clone()) for p in params]


def feed(optimizer, params, generator, steps=3, scale=0.1):
    """Take steps with random gradients."""
    for _ in range(steps):
        for p in params:
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()


def same(ours, theirs, exact=True):
    for a, b in zip(ours, theirs, strict=True):
        rtol, atol = (0, 0) if exact else (1e-5, 1e-6)
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=atol)


def alike(a, b):
    """Whether two states, groups or numbers are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


def started(kind, generator, steps=3, **settings):
    """Weights and an optimizer that has taken some steps."""
    params = weights(generator)
    optimizer = kind.build(params, **settings)
    feed(optimizer, params, generator, steps)
    return params, optimizer


def test_every_optimizer_of_pytorch_is_here():
    known = {n for n, x in vars(T).items() if isinstance(x, type) and issubclass(x, T.Optimizer)}
    assert known - {"Optimizer", "LBFGS", "SparseAdam"} == set(BASES)


def test_every_scheduler_of_pytorch_is_here(generator):
    base = T.lr_scheduler.LRScheduler
    found = [getattr(T.lr_scheduler, name) for name in T.lr_scheduler.__all__]
    known = {x for x in found if issubclass(x, base)} - {base}
    made = {type(make(KINDS["hard SGD"].build(weights(generator)))) for make in SCHEDULERS.values()}
    assert known <= made


# ---- which way, how far


def downhill(kind, params, generator, schedulers=(), steps=10, **settings):
    """Train on minus the overlap with a goal; return the loss before and after."""
    optimizer = kind.build(params, **settings)
    goals = [torch.randn(p.shape, generator=generator) for p in params]
    following = [make(optimizer) for make in schedulers]

    def loss():
        return -sum((p * goal).sum() for p, goal in zip(params, goals, strict=True))

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    before = loss().item()
    for _ in range(steps):
        value = optimizer.step(closure)
        for one in following:
            one.step(
                *([value.detach()] if isinstance(one, T.lr_scheduler.ReduceLROnPlateau) else [])
            )
    assert "lr" in repr(optimizer)
    return before, loss().item()


@every_kind
def test_goes_down(kind, generator, path):
    before, after = downhill(kind, weights(generator), generator)
    assert after < before - 0.1


@kinds
def test_goes_up_when_it_maximizes(kind, generator, path):
    before, after = downhill(kind, weights(generator), generator, maximize=True)
    assert after > before + (0.1 if kind.mode != "brake" else 0)


@kinds
def test_goes_down_with_gaps_in_memory(kind, generator, path):
    gaps = [Parameter(torch.randn(*s, 2, generator=generator)[..., 0]) for s in SHAPES]
    assert not gaps[0].is_contiguous()
    before, after = downhill(kind, gaps, generator)
    assert after < before - 0.1


@kinds
@pytest.mark.parametrize(
    "names", [("Exponential", "Step"), ("Linear", "Plateau"), ("Cosine",), ("Plateau",)], ids=str
)
def test_goes_down_with_schedulers(kind, names, generator):
    for lr in (0.02, torch.tensor(0.02)):
        chosen = [SCHEDULERS[name] for name in names]
        before, after = downhill(kind, weights(generator), generator, chosen, lr=lr)
        assert after < before


# What a group may have of its own.
OF_A_GROUP = {
    "rate": {"lr": 0.2},
    "rate as a tensor": {"lr": torch.tensor(0.2)},
    "no rate": {"lr": 0.0},
    "decay": {"weight_decay": 0.3},
    "momentum": {"momentum": 0.5, "dampening": 0.1},
    "Nesterov": {"nesterov": True},
    "betas": {"betas": (0.5, 0.7)},
    "betas as tensors": {"betas": (torch.tensor(0.5), torch.tensor(0.7))},
    "eps": {"eps": 0.1},
    "maximize": {"maximize": True},
    "one by one": {"foreach": False, "fused": False},
    "rotation": {"lr_mode": "angle"},
    "exponential": {"retraction": "exponential"},
    "moment per vector": {"second_moment": "vector"},
}


@kinds
@pytest.mark.parametrize("own", OF_A_GROUP.values(), ids=OF_A_GROUP)
def test_a_group_moves_as_it_would_alone(kind, own, generator):
    if not own.keys() <= kind.takes:
        pytest.skip("has no such setting")
    first, second = weights(generator)
    one, two = twins([first, second])
    both = kind.build([{"params": [first], **own}, {"params": [second]}])
    apart = kind.build([{"params": [one], **own}]), kind.build([two])
    for _ in range(3):
        grads = [0.1 * torch.randn(p.shape, generator=generator) for p in (first, second)]
        for p, q, grad in zip((first, second), (one, two), grads, strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        for optimizer in (both, *apart):
            optimizer.step()
    same([first, second], [one, two])


@kinds
def test_a_group_added_later_moves_as_one_that_was_there(kind, generator):
    params = weights(generator)
    other = twins(params)
    late, early = kind.build(params[:1]), kind.build([{"params": [p]} for p in other])
    added = {"params": params[1:], "lr": 0.01}
    late.add_param_group({**added, "sphere": kind.sphere} if kind.sphere else added)
    early.param_groups[1]["lr"] = 0.01
    for optimizer, mine in ((late, params), (early, other)):
        feed(optimizer, mine, torch.Generator().manual_seed(1))
    same(params, other)


@kinds
def test_a_rate_changed_by_hand_is_used_at_once(kind, generator):
    params, optimizer = started(kind, generator)
    before = twins(params)
    optimizer.param_groups[0]["lr"] = 0.0
    feed(optimizer, params, generator)
    same(params, before, exact=False)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.2)
    feed(optimizer, params, generator, 1)
    assert (params[0] - before[0]).abs().max() > 1e-3


# ---- schedulers


def scheduled(build, make, lr):
    """Rates over four steps, the weights after them, and whether the rate is the object given."""
    params = weights(torch.Generator().manual_seed(1))
    optimizer = build(params, lr=lr)
    scheduler, seen = make(optimizer), []
    for _ in range(4):
        feed(optimizer, params, torch.Generator().manual_seed(2), 1)
        scheduler.step(*([1.0] if isinstance(scheduler, _PLATEAU) else []))
        seen.append(float(optimizer.param_groups[0]["lr"]))
    return torch.tensor(seen), twins(params), optimizer.param_groups[0]["lr"] is lr


@functools.cache
def of_pytorch(make):
    """Rates that a scheduler gives plain SGD, to one that is a tensor too, and whether it stays.

    Torch 2.9 replaces some tensors, and one scheduler falls over those that it fills.
    """
    rates, _, _ = scheduled(T.SGD, make, 0.1)
    own, _, filled = scheduled(T.SGD, make, torch.tensor(0.1))
    return rates, own, filled


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@kinds
def test_schedulers_fill_a_rate_that_is_a_tensor(kind, make, generator):
    wanted, as_tensor, fills = of_pytorch(make)
    rates, ends, _ = scheduled(kind.build, make, 0.1)
    own_rates, own_ends, filled = scheduled(kind.build, make, torch.tensor(0.1))
    assert filled == fills
    same([wanted, as_tensor], [rates, own_rates], exact=False)
    if torch.allclose(wanted, as_tensor):
        same(ends, own_ends, exact=False)


def test_pytorch_fills_rates_that_are_tensors():
    """From 2.13 on, with no exception, so that the test above asks it of every scheduler."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("an older torch replaces some")
    for make in SCHEDULERS.values():
        wanted, own, fills = of_pytorch(make)
        assert fills
        same([wanted], [own], exact=False)


_PLATEAU = T.lr_scheduler.ReduceLROnPlateau
CYCLES = {
    "OneCycle": lambda o: T.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "Cyclic": lambda o: T.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
}


@pytest.mark.parametrize("make", CYCLES.values(), ids=CYCLES)
@kinds
def test_momentum_that_is_cycled_is_the_momentum_that_is_used(kind, make, generator):
    (first, ours), (second, theirs) = (
        started(kind, torch.Generator().manual_seed(1), steps=0) for _ in range(2)
    )
    scheduler = make(ours)
    for _ in range(3):
        for key in ("lr", "momentum", "betas"):
            if key in ours.param_groups[0]:
                theirs.param_groups[0][key] = ours.param_groups[0][key]
        for optimizer, params in ((ours, first), (theirs, second)):
            feed(optimizer, params, torch.Generator().manual_seed(2), 1)
        scheduler.step()
    same(first, second)
    momentum = ours.param_groups[0].get("momentum", ours.param_groups[0].get("betas", [0])[0])
    assert momentum != 0.9


@kinds
def test_a_scheduler_is_resumed_with_its_optimizer(kind, generator):
    ends = []
    for stop in (False, True):
        params = weights(torch.Generator().manual_seed(1))
        optimizer = kind.build(params)
        scheduler = T.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        for k in range(6):
            if stop and k == 3:
                saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
                optimizer = kind.build(params)
                scheduler = T.lr_scheduler.CosineAnnealingLR(optimizer, 9)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            feed(optimizer, params, torch.Generator().manual_seed(k), 1)
            scheduler.step()
        ends.append(params)
    same(*ends)


# ---- gradients that are missing, zero, or oddly laid out


@every_kind
def test_without_gradients_a_step_is_nothing(kind, generator):
    params = weights(generator)
    before, optimizer = twins(params), kind.build(params)
    optimizer.step()
    assert optimizer.step(lambda: 3.0) == 3.0
    same(params, before)
    assert not any(entries.get("step", 0) for entries in optimizer.state.values())


@every_kind
def test_zero_gradients_move_nothing_at_first(kind, generator):
    if kind.make.func is T.ASGD and kind.mode != "hard":
        pytest.skip("has a decay of its own")
    params = weights(generator)
    before, optimizer = twins(params), kind.build(params)
    feed(optimizer, params, generator, scale=0.0)
    same(params, before, exact=False)


@kinds
def test_a_gradient_that_is_missing_at_times(kind, generator, path):
    """The others go on, and the one without stands still and does not count."""
    if kind.sphere is not None and kind.sphere.joint:
        pytest.skip("parts of one vector move together")
    (a, b), optimizer = started(kind, generator)
    other = twins([a, b])
    alone = kind.build([other[0]])
    alone.load_state_dict(of_first(optimizer.state_dict()))
    held = b.detach().clone()
    for _ in range(2):
        a.grad = 0.1 * torch.randn(a.shape, generator=generator)
        other[0].grad, b.grad = a.grad.clone(), None
        optimizer.step()
        alone.step()
    assert torch.equal(b, held)
    same([a], other[:1])
    feed(optimizer, [b, a], generator, 1)
    counts = [optimizer.state[p].get("step") for p in (a, b)]
    assert counts == [None, None] or [int(x) for x in counts] == [6, 4]


def of_first(saved):
    """Return a saved state with the first parameter only."""
    group = {**saved["param_groups"][0], "params": [0]}
    return copy.deepcopy({"state": {0: saved["state"][0]}, "param_groups": [group]})


@kinds
def test_a_part_of_a_joint_sphere_without_a_gradient(kind, generator, path):
    if kind.sphere is None or not kind.sphere.joint:
        pytest.skip("of joint spheres")
    (a, b), optimizer = started(kind, generator, steps=0)
    before = torch.cat([a.flatten(), b.flatten()]).norm().detach()
    a.grad, b.grad = torch.randn(a.shape, generator=generator), None
    optimizer.step()
    torch.testing.assert_close(torch.cat([a.flatten(), b.flatten()]).norm().detach(), before)
    assert b.grad is None


# name -> the same numbers, differently made
AS_GRADIENTS = {
    "expanded": lambda g: g[:, :1].clone().expand(g.shape),
    "transposed": lambda g: g.T.contiguous().T,
    "with gaps": lambda g: torch.stack([g, g], -1)[..., 0],
    "negated lazily": lambda g: torch._neg_view(-g),
    "a part of a larger one": lambda g: torch.cat([g, g])[len(g) :],
    "with a graph": lambda g: g.clone().requires_grad_() * 1,
    "a parameter": Parameter,
}


@pytest.mark.parametrize("make", AS_GRADIENTS.values(), ids=AS_GRADIENTS)
@kinds
def test_gradients_of_every_make(kind, make, generator, path):
    params = weights(generator)
    other = twins(params)
    ours, theirs = kind.build(params), kind.build(other)
    for _ in range(3):
        for p, q in zip(params, other, strict=True):
            p.grad = make(0.1 * torch.randn(p.shape, generator=generator))
            q.grad = p.grad.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        ours.step()
        theirs.step()
    same(params, other, exact=False)


@kinds
def test_zero_grad(kind, generator):
    params, optimizer = started(kind, generator)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


# ---- tensors of other sizes and kinds


@kinds
def test_empty_tensors_beside_others(kind, generator, path):
    if kind.sphere is not None and kind.sphere.joint:
        pytest.skip("parts of a joint sphere have the same vectors")
    empty, weight = Parameter(torch.zeros(0, 6)), weights(generator)[0]
    (other,) = twins([weight])
    ours, theirs = kind.build([empty, weight]), kind.build([other])
    for grad in 0.1 * torch.randn(3, 4, 6, generator=generator):
        empty.grad, weight.grad, other.grad = torch.zeros(0, 6), grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    same([weight], [other])
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    feed(ours, [empty, weight], generator, 1)


@kinds
def test_all_tensors_empty(kind, generator):
    empty = [Parameter(torch.zeros(0, 6))]
    optimizer = kind.build(empty)
    feed(optimizer, empty, generator)
    assert alike(optimizer.state_dict(), copy.deepcopy(optimizer.state_dict()))


@kinds
def test_precisions_mixed_in_one_group(kind, generator, path):
    """Each tensor moves as it would alone."""
    if kind.sphere is not None and kind.sphere.joint:
        pytest.skip("parts of one vector")
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    params = [weights(generator, d)[0] for d in dtypes]
    alone = [twins([p]) for p in params]
    optimizers = [kind.build(params), *(kind.build(one) for one in alone)]
    for _ in range(3):
        for p, (q,) in zip(params, alone, strict=True):
            p.grad = (0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    same(params, [q for (q,) in alone])


@kinds
def test_the_default_precision_does_not_matter(kind, generator):
    first, second = (weights(torch.Generator().manual_seed(1)) for _ in range(2))
    one = kind.build(first)
    grads = [[0.1 * torch.randn(s, generator=generator) for s in SHAPES] for _ in range(3)]
    steps(one, first, grads)
    torch.set_default_dtype(torch.float64)
    try:
        two = kind.build(second)
        steps(two, second, grads)
    finally:
        torch.set_default_dtype(torch.float32)
    same(first, second)
    if kind.mode is None:  # PyTorch's count their steps in it
        assert alike(one.state_dict()["state"], two.state_dict()["state"])


def steps(optimizer, params, grads):
    for row in grads:
        for p, grad in zip(params, row, strict=True):
            p.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("kind", [OURS["SphereSGD, ordinary"], OURS["SphereAdamW, ordinary"]])
def test_complex_weights_are_ordinary_ones(kind, generator):
    params = weights(generator, torch.complex64)
    other = [Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
    ours, theirs = kind.build(params), kind.build(other)
    for _ in range(3):
        for p, q in zip(params, other, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.complex64)
            q.grad = torch.view_as_real(p.grad).clone()
        ours.step()
        theirs.step()
    same([torch.view_as_real(p.detach()) for p in params], other, exact=False)


@kinds
def test_weights_that_are_frozen_and_thawed(kind, generator):
    (a, b), optimizer = started(kind, generator)
    held = b.detach().clone()
    b.requires_grad_(False)
    b.grad = None
    if kind.sphere is None or not kind.sphere.joint:
        feed(optimizer, [a], generator)
        assert torch.equal(b, held)
    b.requires_grad_()
    feed(optimizer, [a, b], generator)
    assert not torch.equal(b, held)


# ---- states


@kinds
def test_reading_a_state_changes_nothing(kind, generator):
    (first, ours), (second, theirs) = (
        started(kind, torch.Generator().manual_seed(1)) for _ in range(2)
    )
    for k in range(3):
        for optimizer, params in ((ours, first), (theirs, second)):
            feed(optimizer, params, torch.Generator().manual_seed(k), 1)
        before = copy.deepcopy(ours.state_dict())
        assert alike(before, ours.state_dict())
        assert alike(before, theirs.state_dict())
        repr(ours)
    same(first, second)


@kinds
def test_loading_does_not_change_what_is_given(kind, generator):
    params, optimizer = started(kind, generator)
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    other = kind.build(twins(params))
    other.load_state_dict(saved)
    assert alike(saved, before)
    assert alike(other.state_dict(), before)


@kinds
def test_saved_settings_are_used_rather_than_those_here(kind, generator):
    params, optimizer = started(kind, generator)
    other = twins(params)
    second = kind.build(other, lr=0.9)
    second.param_groups[0]["maximize"] = True
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert second.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for one, mine in ((optimizer, params), (second, other)):
        feed(one, mine, torch.Generator().manual_seed(1))
    same(params, other)


def old_group(group, kept=("params", "lr", "sphere")):
    """Drop settings that a version of long ago did not have."""
    always = ("momentum", "betas", "eps", "weight_decay", "dampening", "nesterov", "amsgrad")
    return {key: value for key, value in group.items() if key in (*kept, *always)}


@kinds
def test_a_state_of_long_ago(kind, generator):
    """Without settings that are newer, and with steps as plain numbers."""
    params, optimizer = started(kind, generator)
    other = twins(params)
    second, saved = kind.build(other), copy.deepcopy(optimizer.state_dict())
    saved["param_groups"] = [old_group(group) for group in saved["param_groups"]]
    for entries in saved["state"].values():
        if "step" in entries:
            entries["step"] = entries["step"].item()
    second.load_state_dict(saved)
    for one, mine in ((optimizer, params), (second, other)):
        feed(one, mine, torch.Generator().manual_seed(1))
    same(params, other)


@pytest.mark.parametrize("kind", OURS.values(), ids=OURS)
def test_an_optimizer_pickled_long_ago(kind, generator):
    params, optimizer = started(kind, generator)
    old = copy.deepcopy(optimizer.__getstate__())
    for group in old["param_groups"]:
        for key in ("nonfinite", "master_weights", "foreach", "fused", "maximize"):
            del group[key]
    second = type(optimizer).__new__(type(optimizer))
    second.__setstate__(old)
    mine = [p for group in second.param_groups for p in group["params"]]
    for one, these in ((optimizer, params), (second, mine)):
        feed(one, these, torch.Generator().manual_seed(1))
    same(params, mine)


@every_kind
def test_a_state_goes_through_a_file_of_weights_only(kind, generator):
    params, optimizer = started(kind, generator)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = twins(params)
    second = kind.build(other)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert alike(second.state_dict(), optimizer.state_dict())
    for one, mine in ((optimizer, params), (second, other)):
        feed(one, mine, torch.Generator().manual_seed(1))
    same(params, other)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_state_is_cast_to_the_weights_but_for_what_counts(kind, dtype, generator):
    _, optimizer = started(kind, generator)
    other = weights(generator, dtype)
    second = kind.build(other)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for entries in second.state.values():
        for key, value in entries.items():
            if key == "step":
                assert value.dtype == torch.float32
                assert value.is_cpu
            elif key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                assert value.dtype == dtype
    feed(second, other, generator)
    assert all(p.isfinite().all() for p in other)


@kinds
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_states_with_and_without_names(kind, ours, theirs, generator):
    """Names go with a state, and are not needed for it."""
    params = weights(generator)
    named = [("first", params[0]), ("second", params[1])]
    saves = kind.build(named if theirs else params)
    feed(saves, params, generator)
    other = twins(params)
    loads = kind.build([("a", other[0]), ("b", other[1])] if ours else other)
    loads.load_state_dict(copy.deepcopy(saves.state_dict()))
    expected = ["first", "second"] if theirs else ["a", "b"] if ours else None
    assert loads.param_groups[0].get("param_names") == expected
    for optimizer, mine in ((saves, params), (loads, other)):
        feed(optimizer, mine, torch.Generator().manual_seed(1))
    same(params, other)


@kinds
def test_names_of_an_added_group(kind, generator):
    (a, b) = weights(generator)
    own = {"sphere": kind.sphere} if kind.sphere else {}
    optimizer = kind.build([("a", a)])
    optimizer.add_param_group({"params": [("b", b)], **own})
    assert [group["param_names"] for group in optimizer.param_groups] == [["a"], ["b"]]
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": weights(generator)[:1], **own})
    assert len(optimizer.param_groups) == 2


@kinds
def test_a_state_of_other_groups_is_refused_and_nothing_changes(kind, generator):
    params, optimizer = started(kind, generator)
    before = copy.deepcopy(optimizer.state_dict())
    more = copy.deepcopy(before)
    more["param_groups"].append(copy.deepcopy(more["param_groups"][0]))
    fewer = of_first(before)
    for saved, words in ((more, "number of parameter groups"), (fewer, "match the size")):
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(saved)
        assert alike(optimizer.state_dict(), before)
    feed(optimizer, params, generator)


# ---- copies and hooks


@kinds
def test_a_copy_has_all_public_attributes_and_no_hooks(kind, generator):
    params, optimizer = started(kind, generator)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state"))
    for make in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        second = make(optimizer)
        assert public(second) == public(optimizer)
        mine = [p for group in second.param_groups for p in group["params"]]
        assert alike(second.state_dict(), without_calls(calls, optimizer.state_dict))
        feed(second, mine, torch.Generator().manual_seed(1))
        assert not calls
    feed(optimizer, params, torch.Generator().manual_seed(1))
    same(params, mine)


def public(thing):
    return {name for name in vars(thing) if not name.startswith("_")}


def without_calls(calls, function):
    result = function()
    calls.clear()
    return result


@kinds
def test_hooks_around_a_step(kind, generator):
    """A hook before may give the step other arguments; one that was removed is not called."""
    params, optimizer = started(kind, generator, steps=0)
    calls = []
    before = optimizer.register_step_pre_hook(lambda o, a, k: ((o, lambda: 5.0), {}))
    after = optimizer.register_step_post_hook(lambda o, a, k: calls.append((o, a, k)))
    for p in params:
        p.grad = torch.zeros_like(p)
    assert optimizer.step() == 5.0
    assert calls[0][0] is optimizer
    before.remove()
    after.remove()
    assert optimizer.step() is None
    assert len(calls) == 1


@kinds
def test_hooks_around_saving(kind, generator):
    _, optimizer = started(kind, generator)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(1))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(0), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, packed: packed.update(extra=1))
    optimizer.register_state_dict_post_hook(lambda o, packed: {**packed, "extra": 3})
    optimizer.register_state_dict_post_hook(
        lambda o, packed: packed.update(seen="extra" in packed), prepend=True
    )
    packed = optimizer.state_dict()
    assert calls == [0, 1]
    assert packed["extra"] == 3
    assert packed["seen"] is False
    if kind.sphere is not None:  # hooks see the whole state
        assert "radius" in packed["state"][0]


@kinds
def test_hooks_around_loading(kind, generator):
    params, optimizer = started(kind, generator)
    saved, calls = copy.deepcopy(optimizer.state_dict()), []

    def twice(o, packed):
        calls.append("other")
        groups = [{**g, "lr": 2 * g["lr"]} for g in packed["param_groups"]]
        return {**packed, "param_groups": groups}

    second = kind.build(twins(params))
    second.register_load_state_dict_pre_hook(twice)
    second.register_load_state_dict_pre_hook(lambda o, s: calls.append("first"), prepend=True)
    second.register_load_state_dict_post_hook(lambda o: calls.append("last"))
    second.register_load_state_dict_post_hook(lambda o: calls.append("after"), prepend=True)
    second.load_state_dict(saved)
    assert calls == ["first", "other", "after", "last"]
    assert second.param_groups[0]["lr"] == 2 * optimizer.param_groups[0]["lr"]
    assert saved["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"]


@kinds
def test_a_hook_after_loading_sees_what_was_loaded(kind, generator):
    params, optimizer = started(kind, generator)
    other, seen = kind.build(twins(params)), []
    other.register_load_state_dict_post_hook(
        lambda o: seen.append(copy.deepcopy(o.state_dict()["state"]))
    )
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert alike(seen[0], optimizer.state_dict()["state"])


# ---- closures


@every_kind
def test_a_closure_is_called_once_with_gradients_enabled(kind, generator):
    params, calls = weights(generator), []
    optimizer = kind.build(params)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p * p.flip(1).detach()).sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    assert loss.item() != 0
    optimizer.step()
    assert torch.is_grad_enabled()


@kinds
def test_a_closure_that_fails_leaves_everything(kind, generator):
    params, optimizer = started(kind, generator)
    before, state = twins(params), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    same(params, before)
    assert alike(optimizer.state_dict(), state)


# ---- what is refused


def leaf(*shape, dtype=torch.float32):
    return Parameter(torch.ones(*shape, dtype=dtype), requires_grad=dtype.is_floating_point)


# name -> what is given, error, and what is said of it
WRONG_PARAMS = {
    "nothing": (list, ValueError, "empty parameter list"),
    "a set": (lambda: [{"params": {leaf(2, 3)}}], TypeError, "ordered collections"),
    "no tensor": (lambda: [{"params": [3]}], TypeError, "can only optimize Tensors"),
    "no leaf": (lambda: [{"params": [leaf(2, 3) * 2]}], ValueError, "non-leaf"),
    "some names": (
        lambda: [{"params": [("a", leaf(2, 3)), leaf(2, 3)]}],
        ValueError,
        "Some param names are missing",
    ),
    "names in some groups": (
        lambda: [{"params": [("a", leaf(2, 3))]}, {"params": [leaf(2, 3)]}],
        ValueError,
        "with/without names",
    ),
    "one in two groups": (
        lambda: [{"params": p} for p in [leaf(2, 3)] * 2],
        ValueError,
        "more than one parameter group",
    ),
}


@pytest.mark.parametrize("name", WRONG_PARAMS)
@pytest.mark.parametrize("place", [None, PLACES["rows"]], ids=["ordinary", "rows"])
@pytest.mark.parametrize("make", [SGD, ADAMW], ids=["SGD", "AdamW"])
def test_wrong_parameters_are_refused(make, place, name):
    given, error, words = WRONG_PARAMS[name]
    with pytest.raises(error, match=words):
        make([{**group, "sphere": place} for group in given()])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        make(leaf(2, 3))


# what is given, and what is said; a name that the class does not have is a TypeError
WRONG_SETTINGS = [
    ({"lr": -1.0}, "lr must be at least 0"),
    ({"lr": float("nan")}, "lr must be at least 0"),
    ({"lr": torch.tensor([0.1, 0.2])}, "lr is one number"),
    ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
    ({"momentum": -0.1}, "momentum must be at least 0"),
    ({"nesterov": True, "momentum": 0.0}, "nesterov needs momentum"),
    ({"nesterov": True, "dampening": 0.5}, "nesterov needs momentum"),
    ({"betas": (1.0, 0.9)}, "betas are at least 0 and below 1"),
    ({"betas": (0.9, -0.1)}, "betas are at least 0 and below 1"),
    ({"eps": -1.0}, "eps must be at least 0"),
    ({"second_moment": "row"}, "second_moment must be"),
    ({"retraction": "straight"}, "retraction must be"),
    ({"lr_mode": "rotation"}, "lr_mode must be"),
    ({"nonfinite": "ignore"}, "nonfinite must be"),
    ({"foreach": True, "fused": True}, "cannot both be True"),
    ({"capturable": True, "nonfinite": "raise"}, "does not go with nonfinite"),
    ({"differentiable": True}, "does not take differentiable=True"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG_SETTINGS, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("make", [SGD, ADAMW], ids=["SGD", "AdamW"])
def test_wrong_settings_are_refused(make, settings, words):
    """By the class, and in a group of its own or one that is added, where nothing remains."""
    known = make([leaf(2, 3)]).param_groups[0].keys() | {"differentiable"}
    if not settings.keys() <= known:
        with pytest.raises(TypeError, match="unexpected keyword"):
            make([leaf(2, 3)], **settings)
        return
    with pytest.raises(ValueError, match=words):
        make([leaf(2, 3)], **settings)
    if settings.keys() & {"differentiable", "fused"}:
        return  # as in PyTorch, these are of the class
    with pytest.raises(ValueError, match=words):
        make([{"params": [leaf(2, 3)], **settings}])
    optimizer = make([leaf(2, 3)])
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [leaf(2, 3)], **settings})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.sphere])
def test_weights_on_spheres_are_real(name, dtype):
    with pytest.raises(ValueError, match="real floating point"):
        KINDS[name].build([leaf(2, 3, dtype=dtype)])


@kinds
def test_the_same_tensor_twice_in_a_group_is_said(kind):
    """Around an optimizer it is refused as well: a tensor has one sphere."""
    refused = contextlib.nullcontext()
    if kind.mode and not kind.sphere.joint:
        refused = pytest.raises(ValueError, match="two spheres")
    with pytest.warns(UserWarning, match="duplicate parameters"), refused:
        kind.build([leaf(2, 3)] * 2)


@kinds
def test_sparse_gradients_on_spheres_are_refused_before_anything_moves(kind, generator):
    (a, b), optimizer = started(kind, generator)
    before = twins([a, b])
    a.grad, b.grad = torch.ones_like(a), torch.eye(4, 3).to_sparse()
    if kind.sphere is None and kind.make.func is SphereSGD:
        optimizer.step()  # PyTorch's SGD takes them
        return
    with pytest.raises(RuntimeError, match=r"needs a dense|not take sparse|sparse gradients"):
        optimizer.step()
    same([a, b], before)


def test_state_dicts_keep_their_order():
    """As PyTorch's: by number, so that files of equal runs are equal."""
    optimizer = SGD([{"params": [leaf(2, 3), leaf(2, 3)], "sphere": PLACES["rows"]}])
    feed(optimizer, optimizer.param_groups[0]["params"], torch.Generator().manual_seed(1))
    assert list(OrderedDict(optimizer.state_dict()["state"])) == [0, 1]
