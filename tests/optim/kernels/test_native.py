"""The native kernels against pure PyTorch: the same numbers to rounding."""

import os

import pytest
import torch
from torch import library

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import kernels
from onsphere.optim.distributed.placement import numbers
from onsphere.optim.kernels import ops
from onsphere.optim.kernels.layout import layout_of
from onsphere.optim.steps.project import constrain, record, restore
from optim.table import LAYOUTS, OPTIMIZERS, ROWS, TRAVELS, make, place

pytestmark = [
    pytest.mark.skipif(
        kernels.instruction_set() == "none", reason="the native kernels were not built"
    ),
    pytest.mark.filterwarnings("ignore:a parameter of shape:UserWarning"),
]
SETS = range(["plain", "AVX2", "AVX-512"].index(kernels.instruction_set()) + 1)


def run(on, name, start, grads, sphere, memory, **settings):
    """Take one step per gradient; return weight, momentum and radius."""
    with kernels.switched(on):
        w = torch.nn.Parameter(place(start, memory))
        optimizer = make(name, [{"params": [w], "sphere": sphere}], **settings)
        for grad in grads:
            w.grad = place(grad, memory)
            kept = w.grad.clone()
            optimizer.step()
            torch.testing.assert_close(w.grad, kept, rtol=0, atol=0, equal_nan=True)
    state = optimizer.state[w]
    momentum = state.get("momentum_buffer", state.get("exp_avg"))
    return w.detach(), momentum, state["radius"], optimizer


def compare(name, layout, dtype, generator, **settings):
    shape, memory, sphere = LAYOUTS[layout]
    start = torch.randn(shape, generator=generator).to(dtype)
    if settings.get("options", "").startswith("relative"):  # as far as with a rate
        start = start / (3 * start.numel() / sphere.axes.count(shape))
    grads = torch.randn(3, *shape, generator=generator).to(dtype)
    fast, slow = (
        run(on, name, start, grads, sphere, memory, lr=0.05, **settings) for on in (True, False)
    )
    # Sums are taken in another order; a bfloat16 result may then round to the other side.
    rounding = 2e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(fast[:3], slow[:3], strict=True):
        if ours is None:
            assert theirs is None
            continue
        assert ours.stride() == theirs.stride()
        scale = max(theirs.float().abs().max(), 0.1 * grads.float().abs().max())
        assert (ours.float() - theirs.float()).abs().max() <= rounding * scale


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout(name, layout, dtype, generator):
    compare(name, layout, dtype, generator)


@pytest.mark.parametrize("options", TRAVELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("ascend", [False, True])
@pytest.mark.parametrize("layout", ["rows", "many rows", "heads of columns", "large"])
def test_every_way_to_step(name, options, ascend, layout, generator):
    compare(name, layout, torch.float32, generator, options=options, maximize=ascend)


@pytest.mark.parametrize("number", SETS)
@pytest.mark.parametrize("name", ["SGD", "SGD momentum", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set(number, name, dtype, generator, monkeypatch):
    monkeypatch.setattr(ops, "most_instructions", number)
    compare(name, "rows", dtype, generator)
    compare(name, "many rows", dtype, generator)
    compare(name, "columns", dtype, generator)


ODD = {3: 0.0, 9: torch.nan, 10: torch.inf, 14: 1e-30, 20: 1e30}


@pytest.mark.filterwarnings("ignore:.* left .* vectors:UserWarning")
@pytest.mark.parametrize("number", SETS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("length", [1, 2, 16, 24, 64, 128, 130])
def test_odd_ones_among_many_short_vectors(name, number, length, generator, monkeypatch):
    monkeypatch.setattr(ops, "most_instructions", number)
    start, grads = (torch.randn(*s, length, generator=generator) for s in ((21,), (3, 21)))
    start[5] = 0
    for row, value in ODD.items():
        grads[1, row] *= value
    ends = [run(on, name, start, grads, ROWS, None, lr=0.05) for on in (True, False)]
    for ours, theirs in zip(*(end[:2] for end in ends), strict=True):
        if ours is not None:
            # A tangent momentum is a difference of gradients.
            scale = torch.stack([theirs.flatten(1).abs().amax(-1), grads[0].abs().amax(-1)]).amax(0)
            assert ((ours - theirs).abs().flatten(1).amax(-1) <= 2e-5 * scale).all()
    torch.testing.assert_close(ends[0][2], ends[1][2], rtol=1e-6, atol=0)
    assert ends[0][3].skipped == ends[1][3].skipped


@pytest.mark.filterwarnings("ignore:.* left .* vectors:UserWarning")
@pytest.mark.parametrize("number", SETS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("brake", [False, True])
def test_many_short_vectors_are_restored(number, centered, brake, generator, monkeypatch):
    monkeypatch.setattr(ops, "most_instructions", number)
    sphere, start = Sphere(VectorAxes((0,)), centered=centered), torch.randn(21, 24)
    start[4] = 0
    moved = start + torch.randn(21, 24, generator=generator)
    moved[7], moved[8], moved[9] = 0, torch.nan, start[9]
    ends = []
    for on in (True, False):
        with kernels.switched(on):
            point = start.clone()
            held = constrain([point], sphere, numbers([point], sphere))
            record([held])
            point.copy_(moved)
            left = restore([held], brake=brake, growth=0.25)
            ends.append((point, held.radius, torch.tensor(float(left))))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("ascend", [False, True])
def test_joint_spheres(name, ascend, generator):
    joint = Sphere(VectorAxes((0,)), joint=True)
    start, grads = (
        torch.randn(4, 40, generator=generator),
        torch.randn(3, 4, 40, generator=generator),
    )
    ends = []
    for on in (True, False):
        with kernels.switched(on):
            parts = [torch.nn.Parameter(x.clone()) for x in (start[:, :39], start[:, 39])]
            group = {"params": parts, "sphere": joint}
            optimizer = make(name, [group], lr=0.05, maximize=ascend)
            for grad in grads:
                parts[0].grad, parts[1].grad = grad[:, :39].clone(), grad[:, 39].clone()
                optimizer.step()
            ends.append(torch.cat([p.detach().flatten() for p in parts]))
    assert (ends[0] - ends[1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_number_of_threads_changes_no_bit(name, generator):
    start, grads = torch.randn(3, 140_000, generator=generator), torch.randn(2, 3, 140_000)
    ends = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            ends += [run(True, name, start, grads, s, None, lr=0.05)[0] for s in (Sphere(), ROWS)]
        finally:
            torch.set_num_threads(before)
    for one, other in zip(ends[:2] * 2, ends[2:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", ["rows", "columns", "large"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unsound_vectors_keep_all_their_bits(name, layout, generator):
    shape, memory, sphere = LAYOUTS[layout]
    start = torch.randn(shape, generator=generator)
    grads = torch.randn(2, *shape, generator=generator)
    sphere.axes.gather(grads[1])[...] = torch.nan if layout == "large" else 0
    if layout != "large":
        grads[1].view(-1)[0] = torch.inf
    with pytest.warns(UserWarning, match="left 1 vectors"):
        after, momentum, _, optimizer = run(True, name, start, grads, sphere, memory, lr=0.05)
    before, old, _, _ = run(True, name, start, grads[:1], sphere, memory, lr=0.05)
    place_of = sphere.axes.gather
    assert torch.equal(place_of(after)[0], place_of(before)[0])
    if momentum is not None:
        assert torch.equal(place_of(momentum)[0], place_of(old)[0])
    assert optimizer.skipped == 1


def test_layouts():
    def strides(*shape):
        return torch.empty(shape, device="meta").stride()

    rows, columns = VectorAxes((0,)), VectorAxes((1,))
    assert layout_of((4, 3), strides(4, 3), rows) == (4, 1, 1, 3)
    assert layout_of((4, 3), (1, 4), rows) == (1, 3, 4, 1)
    assert layout_of((4, 3), strides(4, 3), columns) == (1, 4, 3, 1)
    assert layout_of((4, 3), strides(4, 3), VectorAxes()) == (1, 1, 1, 12)
    assert layout_of((4, 6), strides(4, 6), VectorAxes(pieces=((1, 2),))) == (1, 4, 2, 3)
    assert layout_of((2, 4, 3), strides(2, 4, 3), VectorAxes((0, 2))) == (2, 4, 3, 1)
    assert layout_of((2, 3), (1, 2), VectorAxes((0, 1))) is None  # numbered against memory
    assert layout_of((4, 3), (6, 1), rows) is None  # not dense


def test_operators_are_sound(generator):
    p, g = torch.randn(3, 8, generator=generator), torch.randn(3, 8, generator=generator)
    more = [torch.zeros(3, 1)], [], [3, 1, 1, 8], [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    settings = [0.1, 0.0, 0.0, 1e-7, 1e-6, 0, 0, 0, 0, 0, 0, 0]
    tests = ("test_schema", "test_faketensor")
    inputs = ([p], [g], [], [], *more, settings)
    library.opcheck(ops.step, inputs, test_utils=tests)
    parts = ([p], [g], [], [], *more[2:], settings)
    library.opcheck(ops.reduce, parts, test_utils=tests)
    coefficients = [torch.ones(3, 6, dtype=torch.float64)]
    library.opcheck(ops.apply, (*parts[:4], coefficients, *parts[4:]), test_utils=tests)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"brake": True}, {"brake": True, "growth": 0.5}], ids=str)
def test_restoring(layout, dtype, settings, generator):
    shape, memory, sphere = LAYOUTS[layout]
    begin = place(torch.randn(shape, generator=generator).to(dtype), memory)
    moved = place(begin + torch.randn(shape, generator=generator).to(dtype), memory)
    ends = []
    for on in (True, False):
        with kernels.switched(on):
            held = constrain([begin.clone()], sphere, numbers([begin], sphere))
            record([held])
            held.params[0].copy_(moved)
            restore([held], **settings)
            ends.append((held.params[0].float(), held.radius))
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*(end[0] for end in ends), rtol=rounding, atol=rounding)
    torch.testing.assert_close(*(end[1] for end in ends), rtol=1e-5, atol=1e-6)


def test_finite():
    good, bad = torch.ones(3, 5), torch.ones(4)
    assert kernels.finite([good, bad])
    bad[2] = torch.inf
    assert kernels.finite([good, bad]) is False
    assert kernels.finite([torch.ones(4, 4)[:, 0]]) is None
    assert kernels.finite([torch.ones(2).double()]) is None


@pytest.mark.slow
def test_more_entries_than_32_bits_count():
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 6 << 30:
        pytest.skip("needs 6 GB of memory")
    count = (1 << 31) + 4096 + 5
    point = torch.ones(count, dtype=torch.bfloat16)
    radius = torch.tensor([2 * count**0.5])
    assert kernels.restore([point], [radius], Sphere(), brake=False, growth=0.0) == [0]
    assert point[:2].tolist() == point[-2:].tolist() == [2, 2]
    point[-1] = torch.nan
    assert kernels.finite([point]) is False
