"""Bases that are not like those of PyTorch, its options, and weights that it has flattened."""

import copy

import pytest
import torch
from torch import nn

from onsphere.optim import SphereAdamW, SphereSGD, on_sphere
from optim.table import ROWS


class Averaging(torch.optim.Optimizer):
    """Schedule-free SGD: steps at y, is evaluated at x, the average of z."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "train": True, "k": 0})

    @torch.no_grad()
    def _move(self, train, weight):
        group = self.param_groups[0]
        if group["train"] != train:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight)
            group["train"] = train

    def eval(self):
        self._move(False, 1 - 1 / self.param_groups[0]["beta"])

    def train(self):
        self._move(True, 1 - self.param_groups[0]["beta"])

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        assert group["train"]
        group["k"] += 1
        for p in group["params"]:
            z = self.state[p].setdefault("z", p.clone())
            p.lerp_(z, 1 / group["k"])
            p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1))
            z.sub_(p.grad, alpha=group["lr"])

    def where(self):
        return "train" if self.param_groups[0]["train"] else "eval"


def norms(weight):
    return weight.detach().double().norm(dim=1)


def test_param_groups_say_which_weights_are_on_spheres(generator):
    weights = [nn.Parameter(torch.randn(3, 8, generator=generator)) for _ in range(2)]
    groups = [{"params": [weights[0]], "sphere": ROWS}, {"params": [weights[1]]}]
    optimizer = on_sphere(torch.optim.SGD(groups, lr=0.1))
    before = [norms(w) for w in weights]
    for w in weights:
        w.grad = torch.randn(3, 8, generator=generator)
    optimizer.step()
    torch.testing.assert_close(norms(weights[0]), before[0], rtol=1e-6, atol=0)
    assert not torch.isclose(norms(weights[1]), before[1]).any()
    with pytest.warns(UserWarning, match="was given no sphere in any param group, so it is SGD"):
        on_sphere(torch.optim.SGD(weights, lr=0.1))


def test_what_is_evaluated_is_on_the_sphere(generator):
    weights = [nn.Parameter(torch.randn(3, 8, generator=generator)) for _ in range(2)]
    weights[1].data.copy_(weights[0])
    lengths = norms(weights[0])
    optimizers = [on_sphere(Averaging([w]), {w: ROWS}) for w in weights]
    for k, grad in enumerate(torch.randn(6, 3, 8, generator=generator)):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(norms(weights[0]), lengths, rtol=1e-6, atol=0)
        if k % 2:  # one of them is looked at in between, and it makes no difference
            optimizers[0].eval()
            optimizers[0].eval()
            assert optimizers[0].where() == "eval"
            torch.testing.assert_close(norms(weights[0]), lengths, rtol=1e-6, atol=0)
            assert not torch.equal(*weights)
            optimizers[0].train()
            assert optimizers[0].where() == "train"
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_the_base_is_reachable_and_nothing_is_made_up():
    weight = nn.Parameter(torch.ones(2, 3))
    plain = on_sphere(torch.optim.AdamW([weight], fused=True, weight_decay=0.0), {weight: ROWS})
    with pytest.raises(AttributeError, match="eval"):
        plain.eval()
    # What a gradient scaler asks for: it would set its attributes on the wrong optimizer.
    assert not hasattr(plain, "_step_supports_amp_scaling")
    assert copy.deepcopy(plain).base is not plain.base


class Slow(torch.optim.Optimizer):
    """Lookahead, with a state dict of its own."""

    def __init__(self, fast):
        self.fast = fast
        self.slow = [p.detach().clone() for g in fast.param_groups for p in g["params"]]
        self.k = 0
        super().__init__(fast.param_groups, fast.defaults)

    @torch.no_grad()
    def step(self, closure=None):
        self.fast.step()
        self.k += 1
        if self.k % 2 == 0:
            for p, q in zip(self.param_groups[0]["params"], self.slow, strict=True):
                p.copy_(q.lerp_(p, 0.5))

    def state_dict(self):
        return {"fast": self.fast.state_dict(), "slow": [x.clone() for x in self.slow], "k": self.k}

    def load_state_dict(self, saved):
        self.fast.load_state_dict(saved["fast"])
        self.k = saved["k"]
        for p, q in zip(self.slow, saved["slow"], strict=True):
            p.copy_(q)


def test_a_state_dict_of_another_kind(generator):
    def build(weight):
        return on_sphere(Slow(torch.optim.SGD([weight], lr=0.1, momentum=0.9)), {weight: ROWS})

    weight = nn.Parameter(torch.randn(3, 8, generator=generator))
    optimizer, lengths = build(weight), norms(weight)
    grads = torch.randn(6, 3, 8, generator=generator)
    for grad in grads[:3]:
        weight.grad = grad.clone()
        optimizer.step()
    again = nn.Parameter(2 * weight.detach())  # the length must come from the file
    resumed = build(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.data.copy_(weight)
    for grad in grads[3:]:
        for w, o in ((weight, optimizer), (again, resumed)):
            w.grad = grad.clone()
            o.step()
    assert torch.equal(weight, again)
    torch.testing.assert_close(norms(again), lengths, rtol=1e-6, atol=0)


class Relative(torch.optim.Optimizer):
    """A rate of its own, as Adafactor with relative steps has it."""

    def __init__(self, params):
        super().__init__(params, {"lr": None})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.01)


def test_a_base_without_a_rate(generator):
    weight = nn.Parameter(torch.randn(3, 8, generator=generator))
    weight.grad, lengths = torch.randn(3, 8, generator=generator), norms(weight)
    on_sphere(Relative([weight]), {weight: ROWS}).step()
    torch.testing.assert_close(norms(weight), lengths, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="has lr=None"):
        on_sphere(Relative([weight]), {weight: ROWS}, "rotate").step()


@pytest.mark.parametrize("kind", [SphereSGD, SphereAdamW])
def test_options_of_pytorch(kind, generator):
    start, grad = torch.randn(2, 4, 6, generator=generator)

    def step(**settings):
        weights = [nn.Parameter(start.clone()) for _ in range(2)]
        groups = [{"params": weights[:1], "sphere": ROWS}, {"params": weights[1:]}]
        optimizer = kind(groups, lr=0.01, weight_decay=0.0, **settings)
        for _ in range(2):
            for weight in weights:
                weight.grad = grad.clone()
            optimizer.step()
        return weights

    expected = step()
    for settings in (
        {"foreach": True},
        {"fused": True},
        {"fused": False},
        {"foreach": False},
        {"capturable": True},
    ):
        for ours, theirs in zip(step(**settings), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    step(capturable=False, differentiable=False)
    for settings, words in (
        ({"differentiable": True}, "does not take differentiable=True"),
        ({"fused": True, "foreach": True}, "cannot both be True"),
    ):
        with pytest.raises(ValueError, match=words):
            step(**settings)


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_flattened_parameters_are_refused(mark):
    weight = nn.Parameter(torch.ones(12))
    setattr(weight, mark, True)
    with pytest.raises(ValueError, match="Use fully_shard"):
        SphereSGD([{"params": [weight], "sphere": ROWS}])
    with pytest.raises(ValueError, match="Use fully_shard"):
        on_sphere(torch.optim.SGD([weight], lr=0.1), {weight: ROWS})
