"""States that come from elsewhere: another precision, another order, another optimizer."""

import copy

import pytest
import torch

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD, kernels, on_sphere
from optim.table import OPTIMIZERS, ROWS, make

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def norms(weight):
    return weight.detach().double().norm(dim=1)


def start(name, dtype, generator, **settings):
    w = torch.nn.Parameter(torch.randn(4, 32, generator=generator).to(dtype))
    optimizer = make(name, [{"params": [w], "sphere": ROWS}], lr=0.01, **settings)
    for grad in torch.randn(3, 4, 32, generator=generator):
        w.grad = grad.to(dtype)
        optimizer.step()
    return w, optimizer


def goes_on(w, optimizer, lengths, generator):
    """Two steps more; the lengths stay those of the first run."""
    for grad in torch.randn(2, 4, 32, generator=generator):
        w.grad = grad.to(w.dtype)
        optimizer.step()
    rounding = max(1e-6, 4 * torch.finfo(w.dtype).eps)
    assert (norms(w) / lengths - 1).abs().max() < rounding


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("begin", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_another_dtype(name, begin, to, generator):
    w, first = start(name, begin, generator)
    lengths = first.state[w]["radius"].view(-1).double()
    v = torch.nn.Parameter(w.detach().to(to))
    second = make(name, [{"params": [v], "sphere": ROWS}], lr=0.01)
    second.load_state_dict(first.state_dict())
    assert all(
        x.dtype == to for k, x in second.state[v].items() if k.startswith(("exp", "momentum"))
    )
    goes_on(v, second, lengths, generator)


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("begin", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_of_another_dtype_in_the_middle(name, begin, to, generator):
    w, optimizer = start(name, begin, generator)
    lengths = optimizer.state[w]["radius"].view(-1).double()
    w.grad = None
    w.data = w.data.to(to)  # as model.to(dtype) does
    goes_on(w, optimizer, lengths, generator)


def cast(state, dtype):
    """Cast every tensor of a state, as a file's size may be halved."""
    if isinstance(state, dict):
        return {key: cast(value, dtype) for key, value in state.items()}
    if isinstance(state, list):
        return [cast(value, dtype) for value in state]
    is_float = isinstance(state, torch.Tensor) and state.is_floating_point()
    return state.to(dtype) if is_float else state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_file_cast_to_bfloat16(name, generator):
    w, first = start(name, torch.float32, generator)
    lengths = first.state[w]["radius"].view(-1).bfloat16().double()
    second = make(name, [{"params": [w], "sphere": ROWS}], lr=0.01)
    second.load_state_dict(cast(first.state_dict(), torch.bfloat16))
    assert second.state[w]["radius"].dtype == torch.float32
    goes_on(w, second, lengths, generator)


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "AdamW, moment per vector"])
def test_a_state_of_another_size_is_refused(name, generator):
    _, first = start(name, torch.float32, generator)
    for key, wrong, says in (
        ("radius", torch.ones(1, 1), "the saved radius has shape"),
        ("momentum_buffer" if "SGD" in name else "exp_avg", torch.ones(4, 31), "the saved"),
    ):
        w, second = start(name, torch.float32, generator)
        saved = copy.deepcopy(first.state_dict())
        saved["state"][0][key] = wrong
        before = {k: x.clone() for k, x in second.state[w].items()}
        with pytest.raises(ValueError, match=says):
            second.load_state_dict(saved)
        assert all(torch.equal(second.state[w][k], x) for k, x in before.items())


@pytest.mark.skipif(kernels.instruction_set() == "none", reason="the kernels were not built")
def test_the_kernels_do_not_read_what_is_not_there(generator):
    w, optimizer = start("SGD", torch.float32, generator)
    optimizer.state[w]["radius"] = torch.ones(1)
    with pytest.raises(RuntimeError, match="must be 4 contiguous numbers in float32, got 1"):
        optimizer.step()


def by_name(optimizer, saved):
    """Load by name, as PyTorch documents it."""
    number = {
        name: i
        for group in saved["param_groups"]
        for name, i in zip(group["param_names"], group["params"], strict=True)
    }
    state, groups, k = {}, [], 0
    for mine, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for name in mine["param_names"]:
            state[k] = saved["state"][number[name]]
            k += 1
        names = {"params": list(range(k)), "param_names": mine["param_names"]}
        groups.append({**theirs, **names})
    return {"state": state, "param_groups": groups}


@pytest.mark.parametrize("wrapped", [False, True])
def test_loading_by_name(wrapped, generator):
    a = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
    b = torch.nn.Parameter(10 * torch.randn(3, 4, generator=generator))

    def build(named):
        if not wrapped:
            return SphereSGD([{"params": named, "sphere": ROWS}], lr=1e-2, momentum=0.9)
        base = torch.optim.SGD(named, lr=1e-2, momentum=0.9)
        return on_sphere(base, {p: ROWS for _, p in named})

    first = build([("a", a), ("b", b)])
    a.grad, b.grad = torch.randn(2, 3, 4, generator=generator)
    first.step()
    second, calls = build([("b", b), ("a", a)]), []
    second.register_load_state_dict_pre_hook(lambda o, s: calls.append(1) or by_name(o, s))
    second.load_state_dict(first.state_dict())
    before = norms(a), norms(b)
    second.step()
    torch.testing.assert_close(norms(a), before[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(norms(b), before[1], rtol=1e-6, atol=0)
    assert calls == [1]


@pytest.mark.parametrize("float_steps", [False, True])
def test_a_plain_adamws_state_loads(float_steps, generator):
    w = torch.nn.Parameter(torch.randn(4, 32, generator=generator))
    plain = torch.optim.AdamW([w], lr=0.5)
    for grad in torch.randn(3, 4, 32, generator=generator):
        w.grad = grad
        plain.step()
    saved = plain.state_dict()
    saved["state"][0]["max_exp_avg_sq"] = torch.ones(2)  # foreign, and left alone
    if float_steps:  # as PyTorch wrote them once
        saved["state"][0]["step"] = 3.0
    optimizer = SphereAdamW([{"params": [w], "sphere": ROWS}], weight_decay=0.0)
    optimizer.load_state_dict(saved)
    goes_on(w, optimizer, norms(w), generator)
    assert optimizer.state[w]["step"] == 5
    assert torch.equal(optimizer.state[w]["max_exp_avg_sq"], torch.ones(2))


def test_a_saved_sphere_that_differs_is_said(generator):
    w, first = start("SGD", torch.float32, generator)
    other = SphereSGD([{"params": [w], "sphere": Sphere(VectorAxes((0,)), radius=2.0)}])
    with pytest.warns(UserWarning, match="the saved one is used"):
        other.load_state_dict(first.state_dict())
    assert other.param_groups[0]["sphere"] == ROWS


def test_options_of_earlier_names_are_read():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = SphereSGD([{"params": [weight], "sphere": Sphere(VectorAxes((0,)))}], lr=0.1)
    saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    del group["lr_mode"]
    for before, now in (("rotation", "angle"), ("rate", "rate")):
        optimizer.load_state_dict({**saved, "param_groups": [{**group, "lr_is": before}]})
        assert optimizer.param_groups[0]["lr_mode"] == now
        assert "lr_is" not in optimizer.param_groups[0]
    del group["retraction"]
    for before, now in (("retraction", "projection"), ("exponential", "exponential")):
        optimizer.load_state_dict({**saved, "param_groups": [{**group, "step": before}]})
        assert optimizer.param_groups[0]["retraction"] == now
        assert "step" not in optimizer.param_groups[0]
