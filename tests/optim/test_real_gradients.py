"""Gradients as training makes them: inputs that are always zero, tokens that do not occur."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from onsphere import geometry
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD, on_sphere

ROWS = Sphere(VectorAxes((0,)))
pytestmark = pytest.mark.usefixtures("path")


def turned(before, after):
    """Radians by which each row turned."""
    norms = before.double().norm(dim=-1)
    unit = after.double() * (norms / after.double().norm(dim=-1))[..., None]
    return geometry.distance(before.double(), unit) / norms


def classifier(generator, dtype=torch.float32):
    """Data of which 40 of 200 inputs are zero in every example, and a network with BatchNorm."""
    x = torch.rand(256, 200, generator=generator)
    x[:, ::5] = 0
    y = (x @ torch.randn(200, 5, generator=generator)).argmax(1)
    net = nn.Sequential(
        nn.Linear(200, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)
    )
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
        net[3].bias.zero_()
    return net.to(dtype), x.to(dtype), y


def groups_of(net):
    return [{"params": [net[0].weight], "sphere": ROWS}, {"params": list(net[1:].parameters())}]


def plain_adamw(net, **settings):
    base = torch.optim.AdamW(net.parameters(), weight_decay=0.0, **settings)
    return on_sphere(base, {net[0].weight: ROWS})


def sphere_adamw(net, **settings):
    return SphereAdamW(groups_of(net), weight_decay=0.0, lr_mode="rate", **settings)


def fit(build, steps, lr, generator, dtype=torch.float32):
    """Train; return weights on the sphere after every step, and the losses."""
    net, x, y = classifier(generator, dtype)
    optimizer, weights, losses = build(net, lr=lr), [net[0].weight.detach().clone()], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weights.append(net[0].weight.detach().clone())
    return weights, losses


def both(steps, lr, dtype=torch.float32):
    """The same training by SphereAdamW and by AdamW that is scaled back."""
    return [
        fit(build, steps, lr, torch.Generator().manual_seed(0), dtype)
        for build in (sphere_adamw, plain_adamw)
    ]


def test_an_input_that_is_always_zero_does_not_throw_the_vector():
    ours, theirs = (weights for weights, _ in both(5, 1e-3))
    for k in range(5):
        mine, base = turned(ours[k], ours[k + 1]), turned(theirs[k], theirs[k + 1])
        assert mine.max() < 0.1
        torch.testing.assert_close(mine, base, rtol=0.05, atol=0)  # of second order


def test_one_adam():
    """AdamW scaled back has another rate, by the radial part of its update: of second order."""
    gaps = []
    for lr in (1e-3, 1e-4):
        ours, theirs = (weights[-1] for weights, _ in both(3, lr, torch.float64))
        gaps.append((ours - theirs).abs().max().item())
    assert gaps[0] < 1e-4
    assert 50 < gaps[0] / gaps[1] < 200


def test_one_adam_exactly():
    """With that rate the two take the same steps, and keep the same moments."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 40, generator=generator, dtype=torch.float64)
    a, b = (nn.Parameter(start.clone()) for _ in range(2))
    ours = SphereAdamW([{"params": [a], "sphere": ROWS}], weight_decay=0.0, lr_mode="rate")
    theirs = on_sphere(torch.optim.AdamW([b], lr=0.01, weight_decay=0.0), {b: ROWS})
    for grad in torch.randn(5, 1, 40, generator=generator, dtype=torch.float64):
        grad[:, ::3] = 0
        before = b.detach().clone()
        a.grad, b.grad = grad, grad.clone()
        theirs.step()
        moments = theirs.state[b]
        k = int(moments["step"])
        root = (moments["exp_avg_sq"] / (1 - 0.999**k)).sqrt() + 1e-8
        update = moments["exp_avg"] / (1 - 0.9**k) / root
        radial = (update * before).sum() / before.square().sum()
        ours.param_groups[0]["lr"] = 0.01 / (1 - 0.01 * float(radial))
        ours.step()
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-13)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours.state[a][key], theirs.state[b][key], rtol=0, atol=1e-15)


def test_trains_as_well_as_its_base():
    """Best of three rates: within what the seeds make of it."""
    best = [
        min(
            fit(build, 60, lr, torch.Generator().manual_seed(0))[1][-1] for lr in (1e-3, 3e-3, 1e-2)
        )
        for build in (sphere_adamw, plain_adamw)
    ]
    assert best[0] < 1.05 * best[1] + 1e-3


# name -> class and settings; the short memory forgets in fewer steps than float32 has binades
RESTING = {
    "SGD": (SphereSGD, {"momentum": 0.9}, {"momentum": 0.5}),
    "SGD Nesterov": (SphereSGD, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5}),
    "AdamW": (SphereAdamW, {"betas": (0.9, 0.95)}, {"betas": (0.5, 0.6)}),
    "AdamW, no eps": (SphereAdamW, {"betas": (0.9, 0.95), "eps": 0.0}, {"betas": (0.5, 0.6)}),
    "AdamW, moment per vector": (
        SphereAdamW,
        {"betas": (0.9, 0.95), "second_moment": "vector", "eps": 0.0},
        {"betas": (0.5, 0.6)},
    ),
}
MODES = {
    "rate": {"lr_mode": "rate"},
    "relative": {},
    "rotation": {"lr_mode": "angle"},
    "rotation, exponential": {"lr_mode": "angle", "retraction": "exponential"},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def in_every_mode(name, weights, short=False, **settings):
    """Build one optimizer with a group for each mode and its weights."""
    kind, usual, memory = RESTING[name]
    settings = {"weight_decay": 0.0, **usual, **(memory if short else {}), **settings}
    groups = [{"params": weights[mode], "sphere": ROWS, **MODES[mode]} for mode in MODES]
    return kind(groups, **settings)


@pytest.mark.filterwarnings("ignore:weights in torch.bfloat16 that turn:UserWarning")
@pytest.mark.parametrize("name", RESTING)
def test_rows_at_rest(name, path, generator):
    """Rows with one gradient and then none: they turn less and less, and stay finite for ever.

    On the slow path with a memory so short that moments underflow all the same. It is the one
    for float64 in either case.
    """
    lr, short = 1e-3, path == "torch"
    dtypes = DTYPES if short else DTYPES[:2]
    # As long as torch.nn makes them, where that matters.
    sizes = {mode: 0.1 if mode == "relative" else 1.0 for mode in MODES}
    start = torch.randn(4, 32, generator=generator)
    first = torch.randn(4, 32, generator=generator)
    weights = {
        mode: [nn.Parameter((size * start).to(dtype)) for dtype in dtypes]
        for mode, size in sizes.items()
    }
    lengths = {mode: [w.detach().double().norm(dim=1) for w in ws] for mode, ws in weights.items()}
    optimizer = in_every_mode(name, weights, short, lr=lr)
    resting(optimizer, weights, sizes, first)
    places = [rows_of(weights)]
    for grad in torch.randn(210 if short else 1200, 32, generator=generator):
        news = torch.zeros(4, 32)
        news[0] = grad
        resting(optimizer, weights, sizes, news)
        places.append(rows_of(weights))
    way = torch.stack(places)
    angles = turned(way[:-1], way[1:]).reshape(-1, len(MODES), len(dtypes), 4)
    assert optimizer.skipped == 0
    for number, mode in enumerate(MODES):
        for k, dtype in enumerate(dtypes):
            w = weights[mode][k]
            assert w.isfinite().all()
            assert all(x.isfinite().all() for x in optimizer.state[w].values())
            rounding = max(1e-6, 4 * torch.finfo(dtype).eps)
            assert (w.double().norm(dim=1) / lengths[mode][k] - 1).abs().max() < rounding
            if dtype is not torch.bfloat16:
                less_and_less(angles[:, number, k], mode, lr)


def resting(optimizer, weights, sizes, grad):
    """Take a step with the gradient, as large as the weights are."""
    for mode, ws in weights.items():
        for w in ws:
            w.grad = (sizes[mode] * grad).to(w.dtype)
    optimizer.step()


def rows_of(weights):
    """All rows, of every mode and dtype, one below the other."""
    return torch.cat([w.detach().double() for ws in weights.values() for w in ws])


def less_and_less(angles, mode, lr):
    assert angles[-1, 1:].max() < 1e-7
    assert angles[-1, 0] > 1e-4
    # No further than steady momentum could have carried it.
    assert angles[:, 1:].sum(0).max() < (10 if "rotation" in mode else 100) * lr


class Parts(nn.Module):
    """An embedding, experts, and ReLU units of which the first four are dead."""

    def __init__(self, generator):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 3)
            self.hidden.bias[:4] = -100

    def forward(self, tokens, expert):
        x = self.experts[expert](self.embedding(tokens))
        return self.head(self.hidden(nn.functional.layer_norm(x, (8,))).relu())

    def on_spheres(self):
        return [self.embedding.weight, *(e.weight for e in self.experts), self.hidden.weight]

    def groups(self, sphere=ROWS):
        moving = self.on_spheres()
        others = [p for p in self.parameters() if all(p is not q for q in moving)]
        # Of biases without a gradient plain AdamW would make 0/0.
        return [{"params": moving, "sphere": sphere}, {"params": others, "eps": 1e-8}]


def of_ours(name, mode):
    kind, usual, _ = RESTING[name]
    settings = {"lr": 5e-3, "weight_decay": 0.0, **usual, **MODES[mode]}
    return lambda net: kind(net.groups(), **settings)


def around(base, mode):
    def build(net):
        return on_sphere(base(net.parameters()), dict.fromkeys(net.on_spheres(), ROWS), mode)

    return build


SGD = partial(torch.optim.SGD, lr=5e-3, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
WHO = {
    **{f"{name}, {mode}": of_ours(name, mode) for name in RESTING for mode in MODES},
    **{
        f"{mode} {name}": around(base, mode)
        for mode in ("hard", "brake", "rotate")
        for name, base in (("SGD", SGD), ("AdamW", ADAMW))
    },
}
BUSY, EARLY, STEPS = slice(0, 10), slice(10, 20), 40


def train_parts(net, optimizer, to_none, generator):
    """Train on tokens and experts that are busy, or seen in the first three steps, or never.

    Returns the angles by which the rows of the embedding turned in each step, and the losses.
    """
    answers = torch.randint(5, (30,), generator=generator)
    angles, losses = [], []
    for k in range(STEPS):
        tokens = torch.arange(20 if k < 3 else 10)
        optimizer.zero_grad(set_to_none=to_none)
        loss = nn.functional.cross_entropy(net(tokens, 0), answers[tokens])
        if k < 3:
            loss = loss + nn.functional.cross_entropy(net(tokens, 1), answers[tokens])
        loss.backward()
        before = net.embedding.weight.detach().clone()
        optimizer.step()
        angles.append(turned(before, net.embedding.weight.detach()))
        losses.append(loss.item() / (2 if k < 3 else 1))
    return torch.stack(angles), losses


@pytest.mark.parametrize("to_none", [True, False], ids=["no gradient", "zero gradient"])
@pytest.mark.parametrize("who", WHO)
def test_tokens_experts_and_units_at_rest(who, to_none, generator):
    """What never has a gradient never moves; what has one no more comes to rest."""
    net = Parts(generator)
    before = [p.detach().clone() for p in net.on_spheres()]
    optimizer = WHO[who](net)
    angles, losses = train_parts(net, optimizer, to_none, generator)
    after = [p.detach() for p in net.on_spheres()]
    assert losses[-1] < losses[0]
    assert angles[:, BUSY].min() > 0
    for old, new in zip(before, after, strict=True):
        change = new.norm(dim=1) / old.norm(dim=1) - 1
        assert (change if "brake" in who else change.abs()).max() < 1e-6
    never = [(0, slice(20, 30)), (3, slice(None)), (4, slice(0, 4))]
    for number, rows in never:
        torch.testing.assert_close(after[number][rows], before[number][rows], rtol=2e-7, atol=0)
    if "rotate" in who:  # turns by its rate in the direction of an update of any size
        assert angles.max() < 5.01e-3
    else:
        assert angles[3:, EARLY].sum(0).max() < 20 * angles[:3, EARLY].max()
        assert angles[-1, EARLY].max() < 0.1 * angles[2, EARLY].max()
    assert optimizer.skipped == 0


@pytest.mark.parametrize("size", [1e-17, 1e-20, 1e-24, 1e-30, 1e-42])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_too_small_for_a_direction(size, mode, generator):
    w = nn.Parameter(torch.randn(5, 37, generator=generator))
    length = w.detach().norm(dim=1)
    optimizer = SphereSGD([{"params": [w], "sphere": ROWS}], lr=1e-3, momentum=0.9, **MODES[mode])
    for _ in range(6):
        w.grad = torch.randn(5, 37, generator=generator) * size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert (w.detach().norm(dim=1) / length - 1).abs().max() < 1e-6
    # A gradient whose square underflows is none.
    assert optimizer.skipped == (30 if "rotation" in mode and size > 1e-22 else 0)


def test_a_gradient_that_is_almost_radial_turns_no_vector_off_its_sphere(generator):
    start = torch.randn(40, 64, generator=generator)
    for share, refused in ((0.3, 0), (1e-2, 40), (3e-3, 40), (1e-5, 0)):
        w = nn.Parameter(start.clone())
        optimizer = SphereSGD([{"params": [w], "sphere": ROWS}], lr=0.3, lr_mode="angle")
        w.grad = start + share * torch.randn(40, 64, generator=generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert (w.detach().norm(dim=1) / start.norm(dim=1) - 1).abs().max() < 1e-6
        assert optimizer.skipped == refused  # the last is radial to rounding, and asks for nothing


EXTREMES = 20_000
# dtype -> decades of weights and of gradients; what is kept of a length; further settings
RANGES = {
    torch.float64: ((-15, 15), (-320, 30), 1e-6, {}),
    torch.float32: ((-15, 15), (-45, 30), 1e-6, {}),
    torch.bfloat16: ((-15, 15), (-45, 30), 2**-7, {}),
    # Moments in float16 hold no more than a gradient of 200 and its square.
    torch.float16: ((-3, 3), (-8, 1.5), 2**-9, {}),
    "float16, master weights": ((-3, 3), (-8, 4), 2**-9, {"master_weights": True}),
}


def scales(generator, count, low, high):
    return 10 ** (low + (high - low) * torch.rand(count, 1, generator=generator).double())


def extreme(generator, decades, count=EXTREMES):
    """Gradients of all sizes; one in ten is zero, and half have a coordinate that is."""
    grad = torch.randn(count, 8, generator=generator) * scales(generator, count, *decades)
    grad[torch.rand(count, generator=generator) < 0.1] = 0
    grad[:, 0] *= (torch.rand(count, generator=generator) < 0.5).float()
    return grad


def failures(weight, start, rounding, may_shrink=False):
    """Count vectors that are not finite, or off their sphere."""
    drift = weight.detach().double().norm(dim=1) / start.double().norm(dim=1) - 1
    off = (drift if may_shrink else drift.abs()) > rounding
    return int((off | ~weight.detach().isfinite().all(1) | drift.isnan()).sum())


@pytest.mark.parametrize("dtype", RANGES, ids=str)
@pytest.mark.parametrize("name", RESTING)
def test_extremes_of_scale(name, dtype, generator):
    """Weights from 1e-15 to 1e15, gradients from 0 to 1e30, of other sizes in every step."""
    of_weights, of_gradients, rounding, settings = RANGES[dtype]
    kind = torch.float16 if isinstance(dtype, str) else dtype
    start = torch.randn(EXTREMES, 8, generator=generator) * scales(generator, EXTREMES, *of_weights)
    start = start.to(kind)
    weights = {mode: [nn.Parameter(start.clone())] for mode in MODES}
    optimizer = in_every_mode(name, weights, lr=0.02, **settings)
    for _ in range(4):
        grad = extreme(generator, of_gradients).to(kind)
        for (w,) in weights.values():
            w.grad = grad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    for mode, (w,) in weights.items():
        assert not failures(w, start, rounding), mode
        assert all(x.isfinite().all() for x in optimizer.state[w].values()), mode


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("mode", ["hard", "brake", "rotate"])
def test_extremes_around_an_optimizer(mode, base, dtype, generator):
    """In parameters of 500 vectors: of one that is not finite, the base sees no gradient."""
    (low, high), (tiny, _), rounding, _ = RANGES[dtype]
    starts = [
        (torch.randn(500, 8, generator=generator) * scales(generator, 500, low, high)).to(dtype)
        for _ in range(EXTREMES // 500)
    ]
    weights = [nn.Parameter(start.clone()) for start in starts]
    optimizer = on_sphere(base(weights, lr=0.02), dict.fromkeys(weights, ROWS), mode)
    for _ in range(4):
        for k, w in enumerate(weights):  # the largest of each its own: 1e30 and squares overflow
            most = tiny + (30 - tiny) * (k + 1) / len(weights)
            w.grad = extreme(generator, (tiny, most), 500).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert not sum(
        failures(w, start, rounding, mode == "brake")
        for w, start in zip(weights, starts, strict=True)
    )
