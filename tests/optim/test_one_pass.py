"""Steps of PyTorch's own optimizers in one pass: the numbers of the general way, to rounding."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import kernels, on_sphere
from onsphere.optim.modes import one_pass
from optim.table import LAYOUTS, ROWS, place

T = torch.optim
pytestmark = [
    pytest.mark.skipif(
        kernels.instruction_set() == "none", reason="the native kernels were not built"
    ),
    pytest.mark.filterwarnings("ignore:weight_decay=:UserWarning"),
]
BASES = {
    "AdamW": partial(T.AdamW, lr=0.02, weight_decay=0.1),
    "AdamW, fused": partial(T.AdamW, lr=0.02, weight_decay=0.1, fused=True),
    "AdamW, ascending": partial(T.AdamW, lr=0.02, weight_decay=0.1, maximize=True),
    "Adam": partial(T.Adam, lr=0.02),
    "SGD": partial(T.SGD, lr=0.05, weight_decay=0.1),
    "SGD, momentum": partial(T.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD, fused": partial(T.SGD, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "SGD, Nesterov": partial(T.SGD, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD, dampened, ascending": partial(
        T.SGD, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1, maximize=True
    ),
}
PLACES = ("many rows", "whole", "filters, channels last", "many columns", "long rows", "large")
MODES = ("hard", "rotate")


def known(base, mode):
    """Whether its steps are made in one pass: not where momentum may cancel what is to turn."""
    return mode == "hard" or not BASES[base].keywords.get("momentum")


modes = pytest.mark.parametrize("mode", MODES)


class Pair:
    """The same run twice; the second one goes the general way."""

    def __init__(self, base, mode, generator, monkeypatch, layout="many rows", **settings):
        shape, memory, sphere = LAYOUTS[layout]
        self.shapes, self.generator, self.patch = [shape, shape, (5,)], generator, monkeypatch
        starts = [torch.randn(s, generator=generator) for s in self.shapes]
        self.memory = memory
        self.params = [
            [nn.Parameter(place(x, memory if x.ndim > 1 else None)) for x in starts]
            for _ in range(2)
        ]
        self.optimizers = [
            on_sphere(BASES[base](own), dict.fromkeys(own[:2], sphere), mode, **settings)
            for own in self.params
        ]
        self.calls = 0
        step = kernels.Repeated.step
        monkeypatch.setattr(kernels.Repeated, "step", lambda *given: self._counted(step, *given))

    def _counted(self, step, *given):
        self.calls += 1
        return step(*given)

    def step(self, grads=None, change=lambda params, optimizer: None):
        grads = grads or [torch.randn(s, generator=self.generator) for s in self.shapes]
        for number, (own, optimizer) in enumerate(zip(self.params, self.optimizers, strict=True)):
            for p, g in zip(own, grads, strict=True):
                p.grad = None if g is None else torch.empty_like(p).copy_(g)
            change(own, optimizer)
            with self.patch.context() as patch:
                if number:
                    patch.setattr(one_pass, "knows", lambda _: False)
                optimizer.step()

    def compare(self, tolerance=3e-6):
        ours, theirs = self.optimizers
        for p, q in zip(*self.params, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
            mine, other = ours.state[p], theirs.state[q]
            assert mine.keys() == other.keys()
            for key, value in mine.items():
                torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6)
        assert ours.skipped == theirs.skipped
        for held in ours.constrained:
            found = held.sphere.axes.norms(held.params[0].detach().double()).view(-1)
            torch.testing.assert_close(found, held.radius.view(-1).double(), rtol=5e-7, atol=0)


@modes
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("base", BASES)
def test_the_numbers_of_the_general_way(base, layout, mode, generator, monkeypatch):
    pair = Pair(base, mode, generator, monkeypatch, layout)
    for _ in range(4):
        pair.step()
        pair.compare()
    assert pair.calls >= 3 if known(base, mode) else pair.calls == 0


@pytest.mark.parametrize("base", ["AdamW", "SGD, momentum"])
def test_a_wrong_step_is_seen(base, generator, monkeypatch):
    pair = Pair(base, "hard", generator, monkeypatch)
    step_of = one_pass._step_of

    def without_decay(*given):
        step = step_of(*given)
        return one_pass.BaseStep(step.lr, step.mode, 0.0, step.ascend)

    monkeypatch.setattr(one_pass, "_step_of", without_decay)
    for _ in range(4):
        pair.step()
    with pytest.raises(AssertionError):
        pair.compare()


@modes
@pytest.mark.parametrize("momenta", [(0.9, 0.9, 0.0, 0.0, 0.9, 0.9), (0.0, 0.0, 0.9, 0.9, 0.0)])
def test_momentum_that_is_turned_off_and_on(momenta, mode, generator, monkeypatch):
    pair = Pair("SGD, momentum", mode, generator, monkeypatch)
    for momentum in momenta:
        for optimizer in pair.optimizers:
            optimizer.param_groups[0]["momentum"] = momentum
        pair.step()
        pair.compare()
    assert pair.calls


def test_momentum_that_cancels_the_gradient_turns_by_the_rate():
    """Rows turn by exactly the rate, whatever little is left of the update."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 5))
    optimizer = on_sphere(T.SGD([weight], lr=0.02, momentum=0.9), {weight: ROWS}, "rotate")
    weight.grad = torch.randn(6, 5)
    optimizer.step()
    before = weight.detach().double().clone()
    weight.grad = -0.9 * weight.grad * (1 + 1e-4 * torch.randn(6, 5))
    optimizer.step()
    after = weight.detach().double()
    cosine = torch.cosine_similarity(before, after).clamp(-1, 1)
    torch.testing.assert_close(cosine.arccos(), torch.full((6,), 0.02).double(), rtol=2e-4, atol=0)


@modes
@pytest.mark.parametrize("base", BASES)
def test_dead_coordinates_and_dead_vectors(base, mode, generator, monkeypatch):
    pair = Pair(base, mode, generator, monkeypatch)
    alive = (torch.rand(pair.shapes[0], generator=generator) > 0.7).float()
    alive[:2] = 0
    for _ in range(5):
        grads = [torch.randn(s, generator=generator) for s in pair.shapes]
        pair.step([grads[0] * alive, grads[1], grads[2]])
        pair.compare()
    assert bool(pair.calls) == known(base, mode)


def calls_base(ps, o):
    o.base.step = o.base.step


CHANGES = {
    "a hook of the base": lambda ps, o: o.base.register_step_post_hook(lambda *_: None),
    "a step put over it": calls_base,
    "amsgrad": lambda ps, o: (
        o.param_groups[0].update(amsgrad=True),
        [s.update(max_exp_avg_sq=s["exp_avg_sq"].clone()) for s in o.state.values()],
    ),
    "a rate in a tensor": lambda ps, o: o.param_groups[0].update(lr=torch.tensor(0.01)),
    "betas in tensors": lambda ps, o: o.param_groups[0].update(
        betas=(torch.tensor(0.9), torch.tensor(0.99))
    ),
    "no eps": lambda ps, o: o.param_groups[0].update(eps=0.0),
    "coupled decay": lambda ps, o: o.param_groups[0].update(decoupled_weight_decay=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_goes_the_general_way(change, generator, monkeypatch):
    pair = Pair("AdamW", "hard", generator, monkeypatch)
    for _ in range(2):
        pair.step()
    before = pair.calls
    assert before
    pair.step(change=CHANGES[change])
    pair.step()
    pair.compare()
    assert pair.calls == before


@pytest.mark.parametrize(
    "base",
    [T.NAdam, type("Own", (T.AdamW,), {})],
    ids=lambda kind: kind.__name__,
)
def test_only_exactly_these_classes_are_known(base):
    weight = nn.Parameter(torch.ones(2))
    assert one_pass.knows(T.Adam([weight]))
    assert not one_pass.knows(base([weight]))


def without(number):
    return lambda ps, o: setattr(ps[number], "grad", None)


def counted(ps, o):
    o.state[ps[0]]["step"] += 3


ON_THE_WAY = {
    "a rate": lambda ps, o: o.param_groups[0].update(lr=0.01),
    "a decay": lambda ps, o: o.param_groups[0].update(weight_decay=0.3),
    "betas": lambda ps, o: o.param_groups[0].update(betas=(0.5, 0.6)),
    "no gradient on a sphere": without(1),
    "no gradient of an ordinary one": without(2),
    "a step counted by hand": counted,
    "another state": lambda ps, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "other memory": lambda ps, o: setattr(ps[0], "data", ps[0].data.clone()),
    "a gradient of another layout": lambda ps, o: setattr(
        ps[0], "grad", ps[0].grad.T.contiguous().T
    ),
    "a group more": lambda ps, o: o.add_param_group(
        {"params": [nn.Parameter(ps[0][:2].detach().clone())], "sphere": ROWS}
    ),
}


@modes
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", ON_THE_WAY)
def test_changes_on_the_way(change, fused, mode, generator, monkeypatch):
    pair = Pair("AdamW, fused" if fused else "AdamW", mode, generator, monkeypatch)
    for _ in range(2):
        pair.step()
    pair.step(change=ON_THE_WAY[change])
    for _ in range(2):
        pair.step()
    pair.compare()
    assert pair.calls > 3


@modes
@pytest.mark.filterwarnings("ignore:on_sphere left:UserWarning")
def test_a_gradient_that_is_not_finite_leaves_its_parameter_alone(mode, generator, monkeypatch):
    pair = Pair("AdamW", mode, generator, monkeypatch)
    for _ in range(2):
        pair.step()
    weight, other, _ = pair.params[0]
    state = pair.optimizers[0].state[weight]
    before = {key: value.clone() for key, value in state.items()} | {"weight": weight.clone()}
    moved = other.detach().clone()
    pair.step(change=lambda ps, o: ps[0].grad[1, 2].fill_(torch.inf))
    for key, value in (state | {"weight": weight}).items():
        assert torch.equal(value, before[key])
    assert not torch.equal(other, moved)
    assert pair.optimizers[0].skipped == weight.shape[0]
    pair.step()
    pair.compare()


@modes
def test_raise_and_ignore(mode, generator):
    for word in ("raise", "ignore"):
        weight = nn.Parameter(torch.randn(4, 6, generator=generator))
        optimizer = on_sphere(T.SGD([weight], lr=0.1), {weight: ROWS}, mode, nonfinite=word)
        weight.grad, before = torch.ones_like(weight), weight.detach().clone()
        weight.grad[0, 0] = torch.nan
        if word == "raise":
            with pytest.raises(FloatingPointError, match="not finite"):
                optimizer.step()
            assert torch.equal(weight, before)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
            assert torch.equal(weight[0], before[0])
            assert optimizer.skipped == 1


@modes
@pytest.mark.filterwarnings("ignore:on_sphere left:UserWarning")
def test_a_row_of_zeros_keeps_its_parameter_on_the_general_way(mode, generator, monkeypatch):
    pair = Pair("AdamW", mode, generator, monkeypatch)
    for own in pair.params:
        own[0].data[3] = 0
    for _ in range(4):
        pair.step()
    ours, theirs = pair.optimizers
    assert pair.calls
    assert ours.skipped == theirs.skipped == 4
    assert not pair.params[0][0][3].any()
    for p, q in zip(*pair.params, strict=True):
        torch.testing.assert_close(p, q, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"])


@pytest.mark.parametrize("layout", ["many rows", "whole", "many columns", "long rows", "large"])
def test_an_update_that_cancels_its_vector(layout, generator):
    shape, _, sphere = LAYOUTS[layout]
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    lengths = sphere.axes.norms(weight.detach().double())
    optimizer = on_sphere(T.SGD([weight], lr=0.5), {weight: sphere})
    for k in range(3):
        rest = 1e-3 * torch.randn(shape, generator=generator)
        weight.grad = 2 * weight.detach() * (1 - 1e-4 * k) + rest
        optimizer.step()
        found = sphere.axes.norms(weight.detach().double())
        torch.testing.assert_close(found, lengths, rtol=5e-7, atol=0)
    assert not optimizer.skipped


@modes
def test_a_closure_is_called_once_and_so_are_hooks(mode, generator, monkeypatch):
    pair = Pair("AdamW", mode, generator, monkeypatch)
    weight, *_ = pair.params[0]
    optimizer, seen = pair.optimizers[0], []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        seen.append("closure")
        optimizer.zero_grad()
        loss = (weight**3).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert seen == ["pre", "closure", "post"] * 4
    assert pair.calls


def test_sparse_gradients_are_refused_before_anything_moves(generator):
    table = nn.Embedding(5, 4, sparse=True)
    weight = nn.Parameter(torch.randn(4, 6, generator=generator))
    optimizer = on_sphere(T.SGD([weight, table.weight], lr=0.1), {weight: ROWS, table.weight: ROWS})
    before = weight.detach().clone()
    (table(torch.tensor([1])).sum() + weight.sum()).backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("base", [name for name in BASES if "fused" in name])
def test_ordinary_parameters_of_a_fused_base_move_to_the_bit(base, generator, monkeypatch):
    pair = Pair(base, "hard", generator, monkeypatch)
    for _ in range(4):
        pair.step()
    ours, theirs = (own[2] for own in pair.params)
    assert torch.equal(ours, theirs)
    assert pair.optimizers[0].one_pass._ordinary


@modes
@pytest.mark.filterwarnings("ignore:on_sphere left:UserWarning")
@pytest.mark.parametrize("base", ["AdamW", "SGD, Nesterov", "SGD"])
def test_a_resumed_run_takes_the_same_ways(base, mode, generator, monkeypatch):
    """To the bit, with parameters that start late, rest or are not finite on the way."""
    grads = [
        [torch.randn(s, generator=generator) for s in ((21, 37), (21, 37), (5,))] for _ in "7" * 7
    ]
    grads[0][1] = grads[3][1] = grads[4][0] = None
    grads[5][0][2, 2] = torch.nan
    for at in range(1, 7):
        pair = Pair(base, mode, generator, monkeypatch)
        first, _ = pair.optimizers
        resumed = [nn.Parameter(p.detach().clone()) for p in pair.params[0]]
        again = on_sphere(BASES[base](resumed), dict.fromkeys(resumed[:2], ROWS), mode)
        for k, now in enumerate(grads):
            if k == at:
                again.load_state_dict(copy.deepcopy(first.state_dict()))
                for p, q in zip(resumed, pair.params[0], strict=True):
                    p.data.copy_(q)
            for own, optimizer in ((pair.params[0], first), (resumed, again)):
                if optimizer is again and k < at:
                    continue
                for p, g in zip(own, now, strict=True):
                    p.grad = None if g is None else g.clone()
                optimizer.step()
        assert bool(pair.calls) == known(base, mode)
        for p, q in zip(pair.params[0], resumed, strict=True):
            assert torch.equal(p, q)


def test_rotation_needs_no_copy_of_the_weights(generator, monkeypatch):
    pair = Pair("AdamW", "rotate", generator, monkeypatch)
    pair.step()
    assert pair.optimizers[0].buffers._held
    pair.step()
    assert not pair.optimizers[0].buffers._held
    assert pair.optimizers[1].buffers._held


def test_joint_and_centred_spheres_go_the_general_way(generator):
    weights = [nn.Parameter(torch.randn(4, 6, generator=generator)) for _ in range(3)]
    joint, centred = Sphere(VectorAxes((0,)), joint=True), Sphere(VectorAxes((0,)), centered=True)
    optimizer = on_sphere(
        T.SGD(weights, lr=0.1), {tuple(weights[:2]): joint, (weights[2],): centred}
    )
    for weight in weights:
        weight.grad = torch.randn(4, 6, generator=generator)
    optimizer.step()
    assert not optimizer.one_pass._batches
    assert not optimizer.skipped
