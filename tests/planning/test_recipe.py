"""Recipes against what the tuned optimizers really do, on random walks and on small networks."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

import onsphere as osp
from onsphere.dynamics import NormRecorder
from onsphere.dynamics.optimizers import OPTIMIZERS, RecipeError
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD, on_sphere
from onsphere.optim.updates.types import rate_of
from onsphere.planning.recipe import SphereRecipe
from onsphere.planning.tuned import sphere_recipe

ROWS, WHOLE = Sphere(VectorAxes((0,))), Sphere()


class Decoupled(torch.optim.Optimizer):
    """SGD with decoupled decay, or Lion with ``betas``: neither is in PyTorch."""

    def __init__(self, params, lr, weight_decay, betas=None, momentum=0.0):
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "momentum": momentum}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for w in group["params"]:
                m = self.state[w].setdefault("m", torch.zeros_like(w))
                if group["betas"] is None:
                    update = m.mul_(group["momentum"]).add_(w.grad).clone()
                else:
                    blend, keep = group["betas"]
                    update = (blend * m + (1 - blend) * w.grad).sign()
                    m.mul_(keep).add_(w.grad, alpha=1 - keep)
                w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


# method, options, rate and decay, tuned optimizer, tolerance
WALKS = {
    "SGD": ("sgd", {}, (0.1, 0.05), torch.optim.SGD, 0.01),
    "SGD, momentum": ("sgd", {"momentum": 0.9}, (0.01, 0.1), torch.optim.SGD, 0.01),
    "SGD, Nesterov": (
        *("sgd", {"momentum": 0.9, "nesterov": True}, (0.01, 0.1)),
        *(torch.optim.SGD, 0.01),
    ),
    "SGD, dampening": (
        *("sgd", {"momentum": 0.9, "dampening": 0.5}, (0.02, 0.1)),
        *(torch.optim.SGD, 0.01),
    ),
    "SGD, decoupled": (
        *("sgd", {"momentum": 0.9, "decoupled": True}, (0.01, 0.5)),
        *(Decoupled, 0.01),
    ),
    "AdamW": ("adamw", {"betas": (0.9, 0.99)}, (0.01, 0.5), torch.optim.AdamW, 0.03),
    "Lion": ("lion", {"betas": (0.9, 0.95)}, (0.01, 0.5), Decoupled, 0.03),
    "Muon, tall": ("muon", {"momentum": 0.9}, (0.02, 0.3), torch.optim.Muon, 0.03),
    "Muon, square": (
        *("muon", {"momentum": 0.9, "shape": (24, 24)}, (0.02, 0.3)),
        *(torch.optim.Muon, 0.03),
    ),
}
SHAPES = {"Muon, tall": (128, 8), "Muon, square": (24, 24)}


def tuned(case, weights):
    """Build the tuned optimizer itself, and the recipe made of its settings."""
    method, options, (lr, decay), kind, _ = WALKS[case]
    given = {k: v for k, v in options.items() if k not in ("decoupled", "shape")}
    return kind(weights, lr=lr, weight_decay=decay, **given), sphere_recipe(
        method, lr=lr, weight_decay=decay, **options
    )


def walk(optimizer, weights, sphere, steps, generator, factor=None):
    """Follow random gradients, tangent and of size 1/|w|; return all vectors in float64."""
    path = []
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 if factor is None else factor(step))
        views = [sphere.axes.gather(w.detach()) for w in weights]
        path.append([view.double() for view in views])
        for w, view in zip(weights, views, strict=True):
            slope = torch.randn(view.shape, generator=generator) / (view.shape[-1] - 1) ** 0.5
            square = view.square().sum(-1, keepdim=True)
            slope = slope - (slope * view).sum(-1, keepdim=True) / square * view
            w.grad = sphere.axes.scatter(slope / square.sqrt(), w.shape)
        optimizer.step()
    return torch.stack([torch.stack(now) for now in path])


def angles(path, apart=1):
    """Root mean square angle between weights some steps apart, by time."""
    unit = path / path.norm(dim=-1, keepdim=True)
    chord = (unit[apart:] - unit[:-apart]).norm(dim=-1)
    return (2 * torch.asin(chord / 2)).square().flatten(1).mean(1).sqrt()


def start(case, generator):
    """Make weights of the length that the tuned optimizer keeps, their sphere, and its recipe."""
    if case in SHAPES:
        weights = [nn.Parameter(torch.randn(SHAPES[case], generator=generator)) for _ in range(2)]
        sphere = WHOLE
    else:
        weights, sphere = [nn.Parameter(torch.randn(48, 96, generator=generator))], ROWS
    optimizer, recipe = tuned(case, weights)
    unit = {"adamw": 96**0.5, "lion": 96**0.5}.get(recipe.method, 1.0)
    unit = {"Muon, tall": 8**0.5 * (128 / 8) ** 0.5}.get(case, unit)  # torch's factor for the shape
    for w in weights:
        osp.optim.project_(w.detach(), replace(sphere, radius=unit * recipe.equilibrium.norm))
    return weights, sphere, optimizer, recipe


@pytest.mark.parametrize("case", WALKS)
def test_a_random_walk_turns_by_the_recipe(case, generator):
    weights, sphere, optimizer, recipe = start(case, generator)
    path = walk(optimizer, weights, sphere, 500, generator)
    measured = angles(path)[-400:].square().mean().sqrt().item()
    assert measured == pytest.approx(recipe.rotation, rel=WALKS[case][-1])

    groups = [{"params": weights, "sphere": sphere}]
    on = {"sgd": SphereSGD, "adamw": SphereAdamW}.get(recipe.method)
    if on is not None:
        ours = on(recipe.groups(groups), **recipe.keywords)
    else:
        base = type(optimizer)(recipe.plain_groups(groups), **recipe.keywords)
        ours = on_sphere(base, groups, mode="rotate")
    there = walk(ours, weights, sphere, 140, generator)
    torch.testing.assert_close(
        angles(there), torch.full((139,), recipe.rotation).double(), rtol=1e-3, atol=0
    )
    # The same angle per step with the same momentum: the same path, also over many steps.
    far = 20
    assert angles(there, far)[40:].mean().item() == pytest.approx(
        angles(path, far)[-400:].mean().item(), rel=0.06
    )


@pytest.mark.parametrize("method", [name for name, law in OPTIMIZERS.items() if law.has_recipe])
def test_without_momentum_and_with_little_decay_all_are_one(method):
    """The closed form sqrt(2 lr decay), which needs no sum over a memory."""
    options = {"betas": (0.0, 0.0)} if "betas" in OPTIMIZERS[method].defaults else {"momentum": 0.0}
    if method == "muon":
        options["nesterov"] = False
    recipe = sphere_recipe(method, lr=1e-4, weight_decay=1e-2, **options)
    assert recipe.rotation == pytest.approx(math.sqrt(2e-6), rel=1e-4)


def test_closed_forms():
    adamw = sphere_recipe("adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    assert adamw.rotation == pytest.approx(math.sqrt(2e-4 * 0.1 / 1.9), rel=1e-3)
    assert adamw.relaxation == pytest.approx(5000)
    sgd = sphere_recipe("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9)
    assert sgd.rotation == pytest.approx(math.sqrt(1e-4 / 1.9), rel=1e-3)
    assert sgd.relaxation == pytest.approx(0.1 / (4 * 5e-5))


def network(norm):
    """Two normalized layers and a head, and the spheres of the former."""
    torch.manual_seed(0)
    layers = [nn.Linear(24, 32, bias=False), norm(32), nn.ReLU()]
    layers += [nn.Linear(32, 32, bias=False), norm(32), nn.ReLU(), nn.Linear(32, 8)]
    return nn.Sequential(*layers)


def train(net, optimizer, sphere, steps, generator, schedulers=()):
    """Fit labels that are mostly noise; return the rotations of the normalized layers."""
    teacher = torch.randn(24, 8, generator=generator)
    spheres = {name: (net.get_parameter(name), sphere.axes) for name in ("0.weight", "3.weight")}
    recorder = NormRecorder(optimizer, spheres, per_vector=True)
    for _ in range(steps):
        x = torch.randn(16, 24, generator=generator)
        noise = torch.randint(8, (16,), generator=generator)
        noisy = torch.rand(16, generator=generator) < 0.8
        optimizer.zero_grad()
        labels = torch.where(noisy, noise, (x @ teacher).argmax(1))
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    recorder.detach()
    return {name: recorder.series(name)["rotation"] for name in spheres}


@pytest.mark.slow
def test_a_network_turns_by_the_recipe(generator):
    """Filters before BatchNorm under AdamW, within the 15% of the law on networks."""
    recipe = sphere_recipe("adamw", lr=3e-3, weight_decay=0.5, betas=(0.9, 0.99))
    net = network(nn.BatchNorm1d)
    steps = 600 + math.ceil(6 * recipe.relaxation)
    tuned_on = torch.optim.AdamW(net.parameters(), **recipe.keywords)
    for name, series in train(net, tuned_on, ROWS, steps, generator).items():
        # The median, because a filter whose ReLU is always off has no gradient and stands still.
        measured = series[-600:].square().mean(0).sqrt().median().item()
        assert measured == pytest.approx(recipe.rotation, rel=0.15), name

    on = [net.get_parameter("0.weight"), net.get_parameter("3.weight")]
    rest = [p for p in net.parameters() if all(p is not w for w in on)]
    groups = [{"params": on, "sphere": ROWS}, {"params": rest}]
    optimizer = SphereAdamW(recipe.groups(groups), **recipe.keywords)
    for name, series in train(net, optimizer, ROWS, 50, generator).items():
        turned = series[:, (series > 0).all(0)]  # without a gradient there is nothing to turn to
        assert turned.numel() > series.numel() / 2
        torch.testing.assert_close(
            turned, torch.full_like(turned, recipe.rotation), rtol=1e-3, atol=0, msg=name
        )


def cosine(step, steps=600):
    return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


@pytest.mark.parametrize("case", ["SGD", "SGD, momentum", "AdamW", "Lion"])
@pytest.mark.parametrize(
    ("factor", "slow"),
    [(lambda step: 1 if step < 100 else 0.1, 0.5), (cosine, 0.25)],
    ids=["a drop", "cosine"],
)
def test_a_schedule_is_followed_through_the_norm(case, factor, slow, generator):
    """Within 8%, noise of the measure included, where the balance's own rotation is far off."""
    weights, sphere, optimizer, recipe = start(case, generator)
    walk(optimizer, weights, sphere, 200, generator)
    measured = angles(walk(optimizer, weights, sphere, 560, generator, factor)) / recipe.rotation
    followed, schedule = recipe.followed(factor), recipe.schedule(factor)
    # After a drop the momentum still has its old size in AdamW's unit for a few steps.
    times = [t for t in range(0, 560, 10) if not 100 <= t < 140]
    wanted = torch.tensor([followed(t) for t in times], dtype=torch.float64)
    windows = torch.stack([measured[max(0, t - 2) : t + 3].mean() for t in times])
    assert (windows / wanted - 1).abs().max() < 0.08
    balance = torch.tensor([schedule(t) for t in times], dtype=torch.float64)
    assert (wanted / balance - 1).abs().max() > slow


def test_a_drop_and_the_way_back():
    recipe = sphere_recipe("sgd", lr=0.1, weight_decay=0.01, momentum=0.5)
    dropped = recipe.followed(lambda step: 0.25)
    assert recipe.schedule(lambda step: 0.25)(0) == 0.5
    assert [round(dropped(t), 3) for t in (0, 100_000)] == [0.25, 0.5]
    assert dropped(500) == pytest.approx(  # x = f + (1 - f) exp(-rate f t)
        0.25 / math.sqrt(0.25 + 0.75 * math.exp(-0.25 * 500 / recipe.relaxation))
    )
    started = recipe.followed(lambda step: 1.0, initial_norm_ratio=2.0)
    assert started(0) == 0.25  # SGD at twice the norm
    assert started(100_000) == pytest.approx(1)


def test_schedules_go_to_their_groups(generator):
    net = network(nn.BatchNorm1d)
    audit = osp.audit(net, torch.randn(8, 24, generator=generator))
    groups = audit.param_groups(net, weight_decay=0.1)
    recipe = sphere_recipe("adamw", lr=1e-2, weight_decay=0.1)
    optimizer = SphereAdamW(recipe.groups(groups), **recipe.keywords)
    schedules = recipe.schedules(groups, lambda step: 0.5**step)
    scheduler = LambdaLR(optimizer, schedules)
    rotations = train(net, optimizer, ROWS, 5, generator, [scheduler])
    wanted = recipe.rotation * 0.5 ** (torch.arange(5.0).double() / 2)
    torch.testing.assert_close(rotations["0.weight"].mean(1), wanted, rtol=1e-3, atol=0)
    rates = [group["lr"] / 0.5**5 for group in optimizer.param_groups if group["sphere"] is None]
    assert rates == pytest.approx([1e-2] * len(rates))


SCHEDULERS = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 8, eta_min=1e-3),
    "steps": lambda optimizer: StepLR(optimizer, 2, 0.3),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=9),
    "one lambda for all": lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_any_scheduler_acts_as_on_the_tuned_run(schedule, wrapped, generator):
    """The rotation follows the root of the rate that the tuned run has at each step."""
    weight, plain = (nn.Parameter(torch.randn(4, 6, generator=generator)) for _ in range(2))
    recipe = sphere_recipe("adamw", lr=1e-2, weight_decay=0.1)
    groups = [{"params": [weight], "sphere": ROWS}, {"params": [plain]}]
    if wrapped:
        base = torch.optim.AdamW(recipe.plain_groups(groups), **recipe.keywords)
        optimizer = osp.optim.on_sphere(base, groups, mode="rotate")
    else:
        optimizer = SphereAdamW(recipe.groups(groups), **recipe.keywords)
    scheduler = SCHEDULERS[schedule](optimizer)
    for _ in range(6):
        rate, before = optimizer.param_groups[1]["lr"], weight.detach().clone()
        weight.grad, plain.grad = (torch.randn(4, 6, generator=generator) for _ in range(2))
        optimizer.step()
        turned = torch.arccos(torch.cosine_similarity(before, weight.detach()).double())
        wanted = recipe.rotation * (rate / 1e-2) ** 0.5
        torch.testing.assert_close(turned.mean().item(), wanted, rtol=2e-2, atol=0)
        scheduler.step()


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("kind", ["sphere", "wrapped"])
def test_a_state_from_before_turns_on_as_it_did(kind, follow, generator):
    """Groups once had the rotation as their lr, and schedules the root of the tuned factor."""
    recipe = sphere_recipe("adamw", lr=1e-2, weight_decay=0.1)

    def factor(step):
        return 1 - step / 20

    def made():
        weight = nn.Parameter(torch.eye(3))
        groups = [{"params": [weight], "sphere": ROWS}]
        if kind == "sphere":
            return groups, SphereAdamW(recipe.groups(groups))
        base = torch.optim.AdamW(recipe.plain_groups(groups), **recipe.keywords)
        return groups, osp.optim.on_sphere(base, groups, mode="rotate")

    def scheduled(groups, optimizer):
        schedules = recipe.schedules(groups, factor, follow=follow)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)

    rotation = recipe.followed(factor) if follow else recipe.schedule(factor)
    groups, optimizer = made()
    scheduler = scheduled(groups, optimizer)
    groups[0]["params"][0].grad = torch.randn(3, 3, generator=generator)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    state, schedule = optimizer.state_dict(), scheduler.state_dict()
    saved = state["param_groups"][0]
    del saved["rotation_scale"]
    saved |= {"lr": recipe.rotation * rotation(5), "initial_lr": recipe.rotation}
    schedule["base_lrs"] = [recipe.rotation]

    groups, optimizer = made()
    scheduler = scheduled(groups, optimizer)
    with pytest.warns(UserWarning, match=r"saved by an earlier version.*scheduler"):
        optimizer.load_state_dict(state)
    scheduler.load_state_dict(schedule)
    groups[0]["params"][0].grad = torch.randn(3, 3, generator=generator)
    for step in range(5, 12):
        expected = recipe.rotation * rotation(step)
        assert rate_of(optimizer.param_groups[0]) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_a_state_from_before_without_a_scheduler_gets_the_rate_of_the_recipe():
    recipe = sphere_recipe("adamw", lr=1e-2, weight_decay=0.1)
    groups = [{"params": [nn.Parameter(torch.eye(3))], "sphere": ROWS}]
    optimizer = SphereAdamW(recipe.groups(groups))
    state = optimizer.state_dict()
    del state["param_groups"][0]["rotation_scale"]
    state["param_groups"][0]["lr"] = recipe.rotation / 2
    with pytest.warns(UserWarning, match="saved by an earlier version"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 4)
    assert rate_of(optimizer.param_groups[0]) == pytest.approx(recipe.rotation / 2)


def test_the_state_of_a_plain_run_turns_as_the_recipe_says():
    recipe = sphere_recipe("muon", lr=0.02, weight_decay=0.1)
    groups = [{"params": [nn.Parameter(torch.eye(4, 2))], "sphere": ROWS}]
    plain = torch.optim.Muon([nn.Parameter(torch.eye(4, 2))], **recipe.keywords)
    base = torch.optim.Muon(recipe.plain_groups(groups), **recipe.keywords)
    optimizer = osp.optim.on_sphere(base, groups, mode="rotate")
    optimizer.load_state_dict(plain.state_dict())
    assert rate_of(optimizer.param_groups[0]) == pytest.approx(recipe.rotation)


@pytest.mark.parametrize("lr", [-1e-3, torch.tensor(-1e-3)])
@pytest.mark.parametrize("kind", ["sphere", "wrapped"])
def test_a_rate_below_zero_is_said(kind, lr):
    recipe = sphere_recipe("adamw", lr=1e-2, weight_decay=0.1)
    weight = nn.Parameter(torch.eye(3))
    groups = [{"params": [weight], "sphere": ROWS}]
    if kind == "sphere":
        optimizer = SphereAdamW(recipe.groups(groups))
    else:
        base = torch.optim.AdamW(recipe.plain_groups(groups), **recipe.keywords)
        optimizer = osp.optim.on_sphere(base, groups, mode="rotate")
    weight.grad = torch.ones(3, 3)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"lr must be at least 0, got -0\.001.*recipe"):
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.eye(3))


# method, options, rate and decay: settles in some 1,000 steps
SLOW = {
    "SGD": ("sgd", {"momentum": 0.9}, (0.01, 2.5e-3), torch.optim.SGD),
    "AdamW": ("adamw", {"betas": (0.9, 0.99)}, (0.01, 0.05), torch.optim.AdamW),
    "Lion": ("lion", {"betas": (0.9, 0.95)}, (0.01, 0.05), Decoupled),
}


@pytest.mark.parametrize("begin", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("case", SLOW)
def test_a_run_that_does_not_settle(case, begin, generator):
    """The tuned run turns as far as the recipe says, from any norm and for any length.

    One run serves all lengths: the tuned optimizer does not know where it is going to stop.
    """
    method, options, (lr, decay), kind = SLOW[case]
    given = {"initial_norm_ratio": begin} if method == "sgd" else {}
    settled = sphere_recipe(method, lr=lr, weight_decay=decay, **options)
    lengths = [round(lives * settled.relaxation * math.log(2)) for lives in (0.1, 1.0, 3.0)]
    weight = nn.Parameter(torch.randn(24, 96, generator=generator))
    unit = 1.0 if method == "sgd" else 96**0.5
    osp.optim.project_(
        weight.detach(), replace(ROWS, radius=begin * unit * settled.equilibrium.norm)
    )
    groups = [{"params": [weight], "sphere": ROWS}]
    told = []
    for steps in lengths:  # the recipe reads the norm at the start from the weight
        recipe = sphere_recipe(method, lr=lr, weight_decay=decay, **options, steps=steps, **given)
        (schedule,) = recipe.schedules(groups, lambda step: 1.0)
        expected = rate_of(recipe.groups(groups)[0])
        told.append((expected, [expected * schedule(k) ** 0.5 for k in range(steps)]))
    optimizer = kind([weight], lr=lr, weight_decay=decay, **options)
    turned = angles(walk(optimizer, [weight], ROWS, lengths[-1] + 1, generator))
    for steps, (expected, path) in zip(lengths, told, strict=True):
        measured, followed = turned[20:steps], torch.tensor(path[20:steps])
        # The momentum fills first; what was left out of the mean is a part of the shortest runs.
        assert (measured / followed).mean().item() == pytest.approx(1, abs=0.06), steps
        assert sum(path[:steps]) / steps == pytest.approx(expected, rel=0.01), steps


def test_a_run_too_short_to_settle_is_said():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2, 3))], "sphere": ROWS}]
    short = sphere_recipe("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9, steps=300)
    with pytest.warns(UserWarning, match="does not settle"):
        assert rate_of(short.groups(groups)[0]) == pytest.approx(short.equilibrium.rotation)
    long = sphere_recipe("sgd", lr=0.1, weight_decay=5e-4, momentum=0.9, steps=30_000)
    assert rate_of(long.groups(groups)[0]) == pytest.approx(long.rotation)
    known = sphere_recipe(
        "sgd", lr=0.1, weight_decay=5e-4, momentum=0.9, steps=300, initial_norm_ratio=3.0
    )
    assert rate_of(known.groups(groups)[0]) == pytest.approx(known.rotation)
    assert known.rotation < 0.2 * short.rotation
    with pytest.raises(RecipeError, match="give its steps"):
        sphere_recipe("sgd", lr=0.1, weight_decay=5e-4, initial_norm_ratio=3.0)
    with pytest.raises(RecipeError, match="steps is positive"):
        sphere_recipe("sgd", lr=0.1, weight_decay=5e-4, steps=0)


def test_groups_are_copies_and_ordinary_ones_stay():
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    given = [
        {"params": [weight], "sphere": ROWS, "weight_decay": 0.3},
        {"params": [other], "weight_decay": 0.3, "lr": 7.0},
    ]
    recipe = sphere_recipe("sgd", lr=0.1, weight_decay=0.1)
    turned, rest = recipe.groups(given)
    assert rest == given[1]
    assert turned["lr"] == 0.1
    assert rate_of(turned) == pytest.approx(recipe.rotation)
    assert turned["weight_decay"] == 0
    assert given[0]["weight_decay"] == 0.3
    assert "lr" not in given[0]
    assert set(recipe.plain_groups(given)[0]) == {
        "params", "lr", "weight_decay", "rotation_scale",
    }  # fmt: skip


def test_nothing_on_a_sphere_is_told():
    recipe = sphere_recipe("sgd", lr=0.1, weight_decay=0.1)
    with pytest.warns(UserWarning, match="changes nothing"):
        recipe.groups([{"params": [nn.Parameter(torch.ones(3))]}])
    with pytest.raises(TypeError, match="param groups"):
        recipe.groups([nn.Parameter(torch.ones(3))])


def test_decoupled_decay_of_ordinary_weights_keeps_its_size():
    """The keywords go to an optimizer with coupled decay; a weight shrinks by the same factor."""
    recipe = sphere_recipe("sgd", lr=0.1, weight_decay=0.02, momentum=0.9, decoupled=True)
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], **recipe.keywords)
    for _ in range(1000):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert weight.item() == pytest.approx((1 - 0.1 * 0.02) ** 1000, rel=0.05)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "adam"}, "tune AdamW"),
        ({"method": "muno"}, "did you mean 'muon'"),
        ({"lr": -1.0}, "lr is a positive number"),
        ({"lr": math.nan}, "lr is a positive number"),
        ({"weight_decay": math.inf}, "weight_decay is a positive number"),
        ({"weight_decay": 0.0}, "has no equilibrium"),
        ({"lr": 0.0}, "has no equilibrium"),
        ({"lr": 10.0, "weight_decay": 1.0}, "lr \\* weight_decay"),
        ({"momentum": 0.9}, "adamw has no momentum; it takes betas"),
        ({"betas": (0.9, 1.0)}, "betas are two numbers"),
        ({"betas": 0.9}, "betas are two numbers"),
        ({"method": "sgd", "betas": (0.9, 0.9)}, "sgd has no betas"),
        ({"method": "sgd", "momentum": 1.0}, "momentum is at least 0 and below 1"),
        ({"method": "sgd", "nesterov": True}, "nesterov needs momentum"),
        ({"method": "muon", "shape": (0, 4)}, "at least one row"),
    ],
)
def test_what_has_no_recipe(change, says):
    with pytest.raises(RecipeError, match=says) as caught:
        sphere_recipe(**{"method": "adamw", "lr": 1e-3, "weight_decay": 0.1, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf])
def test_a_schedule_that_cannot_be(factor):
    recipe = sphere_recipe("adamw", lr=1e-3, weight_decay=0.1)
    for turned in (recipe.schedule(lambda step: factor), recipe.followed(lambda step: factor)):
        with pytest.raises(RecipeError, match="factor is at least 0"):
            turned(1)
    with pytest.raises(RecipeError, match="initial_norm_ratio"):
        recipe.followed(lambda step: 1.0, initial_norm_ratio=0.0)


def test_it_prints_as_one_line():
    recipe = sphere_recipe("lion", lr=1e-4, weight_decay=1.0)
    assert isinstance(recipe, SphereRecipe)
    assert str(recipe) == (
        "lion(lr=0.0001, weight_decay=1.0, betas=(0.9, 0.99)): turns by 0.00209 radians per "
        "step, settles in some 5,000 steps"
    )
