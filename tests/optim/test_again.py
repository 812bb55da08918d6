"""Ordinary parameters and counters that are moved as in the last step: seen when they change."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from onsphere.optim import SphereAdamW, SphereSGD, kernels
from onsphere.optim.steps.repeated import ReadyInSpace
from optim.table import ROWS

needs_kernels = pytest.mark.skipif(
    kernels.instruction_set() == "none", reason="the native kernels were not built"
)
SHAPES = [(6, 8), (4, 8), (3,), (7,), (5, 2)]
KINDS = {
    "AdamW": partial(SphereAdamW, lr=0.05, weight_decay=0.1),
    "SGD": partial(SphereSGD, lr=0.05),
    "SGD with momentum": partial(SphereSGD, lr=0.05, momentum=0.9),
}
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=.*:UserWarning")


def groups_of(params):
    return [{"params": params[:2], "sphere": ROWS}, {"params": params[2:]}]


class Twins:
    """Two of the same, one of which remembers nothing."""

    def __init__(self, kind, generator):
        self.generator = generator
        starts = [torch.randn(s, generator=generator) for s in SHAPES]
        self.params = [[nn.Parameter(x.clone()) for x in starts] for _ in range(2)]
        self.optimizers = [KINDS[kind](groups_of(own)) for own in self.params]

    def step(self, change=lambda params, optimizer: None):
        grads = [torch.randn(p.shape, generator=self.generator) for p in self.params[0]]
        for number, own in enumerate(self.params):
            optimizer = self.optimizers[number]
            for p, g in zip(own, grads, strict=True):
                p.grad = g.to(p.dtype, copy=True)
            change(own, optimizer)
            if number:
                optimizer._ready.clear()
            optimizer.step()
        for p, q in zip(*self.params, strict=True):
            assert p.dtype == q.dtype
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)

    def remembers(self):
        held = self.optimizers[0]._ready.values()
        return any(isinstance(ready, ReadyInSpace) for ready in held)


@pytest.fixture(params=KINDS)
def twins(request, generator):
    made = Twins(request.param, generator)
    for _ in range(3):
        made.step()
    return made


def narrowed(ps, o):
    ps[3].grad, ps[3].data = None, ps[3].data[:4]
    ps[3].grad = torch.ones(4)
    for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        if key in o.state[ps[3]]:
            o.state[ps[3]][key] = o.state[ps[3]][key][:4]


def replaced(ps, o, key, value):
    if key in o.state[ps[2]]:
        o.state[ps[2]][key] = value(o.state[ps[2]][key])


CHANGES = {
    "rate": lambda ps, o: o.param_groups[1].update(lr=0.01),
    "a rate in a tensor": lambda ps, o: o.param_groups[1].update(lr=torch.tensor(0.02)),
    "maximize": lambda ps, o: o.param_groups[1].update(maximize=True),
    "decay": lambda ps, o: o.param_groups[1].update(weight_decay=0.5),
    "betas": lambda ps, o: o.param_groups[1].update(betas=(0.5, 0.6)),
    "momentum": lambda ps, o: o.param_groups[1].update(
        momentum=0.0 if o.param_groups[1].get("momentum") else 0.5
    ),
    "not fused": lambda ps, o: o.param_groups[1].update(fused=False),
    "foreach": lambda ps, o: o.param_groups[1].update(foreach=True),
    "memory": lambda ps, o: setattr(ps[3], "data", ps[3].data.clone()),
    "memory in place": lambda ps, o: ps[3].data.set_(ps[3].data.clone()),
    "a smaller weight in the same place": narrowed,
    "layout of a gradient": lambda ps, o: setattr(ps[4], "grad", ps[4].grad.T.contiguous().T),
    "a missing gradient": lambda ps, o: setattr(ps[3], "grad", None),
    "another state": lambda ps, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "a moment": lambda ps, o: replaced(ps, o, "exp_avg", torch.zeros_like),
    "a buffer": lambda ps, o: replaced(ps, o, "momentum_buffer", torch.zeros_like),
    "a moment elsewhere": lambda ps, o: replaced(
        ps, o, "exp_avg", lambda x: setattr(x, "data", x.data.clone()) or x
    ),
    "a counter": lambda ps, o: replaced(ps, o, "step", lambda x: x + 5),
    "a counter in place": lambda ps, o: replaced(ps, o, "step", lambda x: x.add_(5)),
    "a counter on a sphere": lambda ps, o: [
        o.state[p]["step"].add_(5) for p in ps[:1] if "step" in o.state[p]
    ],
    "a counter elsewhere": lambda ps, o: replaced(
        ps, o, "step", lambda x: setattr(x, "data", x.data.clone()) or x
    ),
    "no state": lambda ps, o: o.state.pop(ps[2], None),
    "fewer parameters": lambda ps, o: o.param_groups[1]["params"].pop(),
    "a group more": lambda ps, o: o.add_param_group({"params": [torch.ones(3)]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_seen(twins, change):
    done = []

    def once(params, optimizer):
        if len(done) < 2:
            done.append(CHANGES[change](params, optimizer))

    for _ in range(4):
        twins.step(once)


def test_another_precision(twins):
    for own in twins.params:
        for p in own:
            p.grad, p.data = None, p.data.double()
    for optimizer in twins.optimizers:
        for state in optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if key in state:
                    state[key] = state[key].double()
    for _ in range(3):
        twins.step()


@needs_kernels
def test_it_is_used(twins):
    assert twins.remembers()


def test_gradients_are_not_kept(twins):
    for p in twins.params[0]:
        p.grad = None
    for ready in twins.optimizers[0]._ready.values():
        assert not getattr(ready, "_grads", [])


def test_switched_off_in_the_middle(twins):
    with kernels.switched(False):
        twins.step()
    twins.step()


def test_sparse_gradients_are_refused(twins):
    ours, params = twins.optimizers[0], twins.params[0]
    if isinstance(ours, SphereSGD):
        pytest.skip("SGD takes them")
    for p in params:
        p.grad = torch.ones_like(p)
    params[4].grad = torch.ones_like(params[4]).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        ours.step()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_do_not_share(twins, copied):
    ours, params = twins.optimizers[0], twins.params[0]
    other = copied(ours)
    before = [p.detach().clone() for p in params]
    counts = [float(ours.state[p].get("step", 0)) for p in params]
    for group in other.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    other.step()
    other.step()
    for p, x, count in zip(params, before, counts, strict=True):
        assert torch.equal(p, x)
        assert float(ours.state[p].get("step", 0)) == count


@needs_kernels
def test_counters_are_counted_together():
    counters = kernels.Counters([torch.tensor(3.0) for _ in range(3)])
    assert counters.count() == 4
    assert [float(x) for x in counters.tensors] == [4, 4, 4]
    counters.tensors[1].add_(1)
    assert counters.count() is None
    assert [float(x) for x in counters.tensors] == [4, 5, 4]


@pytest.mark.parametrize(
    "other", [torch.tensor(1.0, dtype=torch.float64), torch.tensor(1), torch.ones(2)]
)
def test_other_counters_are_not(other):
    assert not kernels.Counters.possible([torch.tensor(1.0), other])


def test_as_torch_does(generator):
    starts = [torch.randn(s, generator=generator) for s in SHAPES]
    ours, theirs = ([nn.Parameter(x.clone()) for x in starts] for _ in range(2))
    optimizers = [
        SphereAdamW([{"params": ours}], lr=0.05, weight_decay=0.1),
        torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1, fused=True),
    ]
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
