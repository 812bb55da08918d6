"""Steps that are made as the last one: the same numbers, and seen when something has changed."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import OnSphere, kernels, on_sphere
from optim.table import OPTIMIZERS, ROWS, make

pytestmark = pytest.mark.skipif(
    kernels.instruction_set() == "none", reason="the native kernels were not built"
)
SHAPES = [(6, 37), (4, 8), (5, 3, 2)]


def wrapped(mode, groups, **settings):
    base = torch.optim.AdamW([p for g in groups for p in g["params"]], lr=0.05, weight_decay=0.0)
    return on_sphere(base, groups, mode)


def of_table(name, groups, **settings):
    return make(name, groups, lr=0.05, **settings)


BUILDERS = {name: partial(of_table, name) for name in OPTIMIZERS}
BUILDERS |= {mode: partial(wrapped, mode) for mode in ("hard", "brake", "rotate")}


class Never(kernels.Repeated):
    """What makes every step anew."""

    possible = staticmethod(lambda *_: False)


class Twins:
    """Two of the same, one of which makes every step anew."""

    def __init__(self, build, monkeypatch, generator, dtype=torch.float32):
        self.generator, self.patch, self.dtype = generator, monkeypatch, dtype
        starts = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
        self.params = [[nn.Parameter(x.clone()) for x in starts] for _ in range(2)]
        self.optimizers = [build([{"params": own, "sphere": ROWS}]) for own in self.params]

    def step(self, change=lambda params, optimizer: None, grads=None):
        grads = grads or [torch.randn(s, generator=self.generator).to(self.dtype) for s in SHAPES]
        for number, (own, optimizer) in enumerate(zip(self.params, self.optimizers, strict=True)):
            with self.patch.context() as patch:
                if number:
                    patch.setattr(kernels, "Repeated", Never)
                    patch.setattr("onsphere.optim.modes.restore.repeated", lambda _: [])
                    patch.setattr(kernels, "finite_of", lambda _: None)
                for p, g in zip(own, grads, strict=True):
                    p.grad = None if g is None else g.to(p.dtype, copy=True)
                change(own, optimizer)
                optimizer.step()
        for p, q in zip(*self.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.fixture(params=BUILDERS)
def twins(request, monkeypatch, generator):
    made = Twins(BUILDERS[request.param], monkeypatch, generator)
    made.name = request.param
    for _ in range(3):
        made.step()
    return made


def test_it_is_used(twins):
    ours, theirs = twins.optimizers
    used = [o._ready if not isinstance(o, OnSphere) else _calls(o) for o in (ours, theirs)]
    assert used[0]
    assert not used[1]


def _calls(optimizer):
    return optimizer.restorer.calls if optimizer.mode == "brake" else optimizer.one_pass._batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_the_same_steps(name, dtype, monkeypatch, generator):
    twins = Twins(BUILDERS[name], monkeypatch, generator, dtype)
    for _ in range(10):
        twins.step()


CHANGES = {
    "rate": lambda ps, o: o.param_groups[0].update(lr=0.01),
    "maximize": lambda ps, o: o.param_groups[0].update(maximize=True),
    "momentum": lambda ps, o: o.param_groups[0].update(
        momentum=0.0 if o.param_groups[0].get("momentum") else 0.5, nesterov=False
    ),
    "betas": lambda ps, o: o.param_groups[0].update(betas=(0.5, 0.6)),
    "how far": lambda ps, o: o.param_groups[0].update(lr_mode="angle"),
    "memory": lambda ps, o: setattr(ps[0], "data", ps[0].data.clone()),
    "layout": lambda ps, o: setattr(ps[0], "data", ps[0].data.T.contiguous().T),
    "layout of a gradient": lambda ps, o: setattr(ps[0], "grad", ps[0].grad.T.contiguous().T),
    "precision": lambda ps, o: [
        (setattr(p, "grad", None), setattr(p, "data", p.data.double()), setattr(p, "grad", p.data))
        for p in ps
    ],
    "a missing gradient": lambda ps, o: setattr(ps[1], "grad", None),
    "another state": lambda ps, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "a moment of another place": lambda ps, o: o.state[ps[0]].update(
        {k: v.clone() for k, v in o.state[ps[0]].items()}
    ),
    "a gradient that is not finite": lambda ps, o: ps[0].grad[1].fill_(torch.nan),
    "fewer parameters": lambda ps, o: o.param_groups[0]["params"].pop(),
    "a group more": lambda ps, o: o.add_param_group({"params": [ps[0][:2].detach().clone()]}),
}


OWN_STATE = ("layout", "precision", "fewer parameters")


@pytest.mark.filterwarnings("ignore:.* left .* vectors:UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_seen(twins, change):
    if change in OWN_STATE and "constrained" in vars(twins.optimizers[0]):
        pytest.skip("the base's own state does not fit then")
    done = []

    def once(params, optimizer):
        if len(done) < 2:
            done.append(CHANGES[change](params, optimizer))

    for _ in range(4):
        twins.step(once)
    assert twins.optimizers[0].skipped == twins.optimizers[1].skipped


def test_switched_off_in_the_middle(twins):
    with kernels.switched(False):
        twins.step()
    twins.step()


def test_copies_do_not_share(twins):
    ours, params = twins.optimizers[0], twins.params[0]
    other = copy.deepcopy(ours)
    before = [p.detach().clone() for p in params]
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    other.step()
    for p, x in zip(params, before, strict=True):
        assert torch.equal(p, x)


def test_columns_and_whole_tensors(generator, monkeypatch):
    for sphere in (Sphere(), Sphere(VectorAxes((1,))), Sphere(VectorAxes((0,)), radius=2.0)):
        twins = Twins(
            lambda groups, own=sphere: make(
                "AdamW", [{**g, "sphere": own} for g in groups], lr=0.05
            ),
            monkeypatch,
            generator,
        )
        for _ in range(4):
            twins.step()


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.double(),
        lambda x: x.t(),
        lambda x: x[:2],
        lambda x: x.to_sparse(),
        torch._neg_view,
    ],
    ids=["dtype", "strides", "shape", "layout", "negated"],
)
def test_kinds_are_asked_again_after_they_have_fitted(other):
    """The first fit leaves guards behind, by which all later ones are answered first."""
    kinds = kernels.Kinds([torch.ones(4, 4), torch.ones(3)])
    alike = [torch.zeros(4, 4), torch.zeros(3)]
    assert kinds.fit(alike)
    assert kinds.fit(alike)
    assert kinds.fit([nn.Parameter(torch.ones(4, 4)), torch.ones(3)])  # other types, same memory
    assert not kinds.fit([other(torch.ones(4, 4)), torch.ones(3)])
    assert not kinds.fit(alike[:1])
    assert kinds.fit(alike)


@pytest.mark.parametrize("at", [0, 120_000, 239_999])
@pytest.mark.parametrize("many", [False, True])
def test_one_bad_gradient_in_a_large_vector_leaves_all_of_it(at, many, generator):
    """Moments are written chunk by chunk before all is known, and taken back: to rounding."""
    weight = nn.Parameter(torch.randn(600, 400, generator=generator))
    optimizer = make("AdamW", [{"params": [weight], "sphere": Sphere()}], lr=0.05)
    weight.grad = torch.randn(600, 400, generator=generator)
    optimizer.step()
    held = [weight, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]]
    before = [x.detach().clone() for x in held]
    weight.grad.flatten()[at] = torch.inf
    if many:
        weight.grad.flatten()[::7919] = torch.nan
    with pytest.warns(UserWarning, match="left"):
        optimizer.step()
    assert torch.equal(weight, before[0])
    for now, then, size in zip(held[1:], before[1:], (1, 1e-3), strict=True):
        torch.testing.assert_close(now, then, rtol=1e-6, atol=1e-6 * size)
    assert optimizer.skipped == 1


def test_a_large_vector_of_zeros_stays_and_its_moments_wait(generator):
    """It has no direction: what was written of its moments before that was known is taken back."""
    weight = nn.Parameter(torch.zeros(600, 400))
    optimizer = make("AdamW", [{"params": [weight], "sphere": Sphere()}], lr=0.05)
    for _ in range(3):
        weight.grad = torch.randn(600, 400, generator=generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert not weight.any()
    assert not optimizer.state[weight]["exp_avg"].any()
    assert not optimizer.state[weight]["exp_avg_sq"].any()
