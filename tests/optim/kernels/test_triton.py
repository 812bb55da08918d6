"""The Triton kernels against pure PyTorch: in Triton's interpreter, and on a GPU if there is one.

The interpreter is chosen when Triton is imported, so its tests run in a process of their own,
which ``test_in_the_interpreter`` starts: this file again, with ``ONSPHERE_NATIVE=triton``. The
longest vectors take most of its time, and are marked ``slow``.
"""

import importlib.util
import inspect
import itertools
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from torch import library

from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import kernels
from onsphere.optim.distributed.placement import numbers
from onsphere.optim.kernels import ops
from onsphere.optim.kernels.triton import launch
from onsphere.optim.steps.project import constrain, record, restore
from optim.contract import MEMBERS, feed, loss_of, target, train
from optim.table import LAYOUTS, OPTIMIZERS, ROWS, TRAVELS, make, place

pytestmark = pytest.mark.filterwarnings("ignore:a parameter of shape:UserWarning")
MISSING = importlib.util.find_spec("triton") is None
# name -> settings of launch.py that send vectors of any length this way
WAYS = {
    "registers": {"_IN_REGISTERS": 1 << 20},
    "long": {"_IN_REGISTERS": 0, "_MANY": 0},
    "chunks": {"_IN_REGISTERS": 0, "_MANY": 1 << 20},
}
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def patch_once():
    """Have the interpreter prepare its language once for a kernel, not for every function in it.

    And look for the builtins of a module once: together half of its time.
    """
    from triton.runtime import interpreter

    patch_before, run_before = interpreter._patch_lang, interpreter.GridExecutor.__call__
    names, patched = {}, set()

    def patch_builtin(module, *rest):
        if module not in names:
            members = inspect.getmembers(module)
            names[module] = [name for name, x in members if interpreter.tl.core.is_builtin(x)]
        for name in names[module]:
            member = getattr(module, name)
            if interpreter.tl.core.is_builtin(member):
                interpreter._patch_attr(module, name, member, *rest)

    def run(self, *args, **kwargs):
        patched.clear()  # what a kernel patches is undone at its end
        return run_before(self, *args, **kwargs)

    def patch_lang(function):
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch_before(function)

    interpreter._patch_builtin = patch_builtin
    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = run


def look_up_once():
    """Have the interpreter not make its table of NumPy's types whenever it asks for one."""
    from triton.runtime import interpreter

    ask_before, found = interpreter._get_np_dtype, {}

    def np_dtype(kind):
        kind = kind.scalar
        if kind.name not in found:
            found[kind.name] = ask_before(kind)
        return found[kind.name]

    interpreter._get_np_dtype = np_dtype


def leave_small_numbers():
    """Have the interpreter not compute in 64 bits, too, whether sums of indices fit into 32.

    On a device nothing checks it either, and no index of these tests comes near 2**31.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def loop_with_any_numpy():
    """Have the interpreter of Triton 3.5 read the bounds of a loop as later ones do.

    It takes ``int()`` of an array with one entry, which NumPy 2.4 refuses.
    """
    from triton.runtime import interpreter

    patch_before = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *rest):
        patch_before(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


if launch.interpreted:
    patch_once()
    look_up_once()
    leave_small_numbers()
    if version("triton").startswith("3.5."):
        loop_with_any_numpy()


def here(device):
    if device == "cpu":
        return launch.interpreted
    return torch.cuda.is_available() and launch.present(torch.device("cuda"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if MISSING or not here(request.param):
        pytest.skip("the kernels do not run on this device")
    with np.errstate(all="ignore"):  # the interpreter computes what no one will look at
        yield request.param


@pytest.mark.skipif(MISSING or launch.interpreted, reason="Triton is not installed")
@pytest.mark.parametrize(
    "chosen", ["not gpu and not slow", pytest.param("not gpu and slow", marks=pytest.mark.slow)]
)
def test_in_the_interpreter(chosen):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", chosen, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "ONSPHERE_NATIVE": "triton"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


# name -> flags of tile_plan.py
COMPILED = {
    "AdamW": ("DIAGONAL", "MOVING", "ALIGNED"),
    "AdamW, per vector, exponential": ("MOVING", "PER_VECTOR", "EXPONENTIAL", "ASCEND"),
    "SGD, rotation, bfloat16": ("ROTATION", "BFLOAT16"),
    "brake, centred": ("RESTORE", "BRAKE", "CENTERED"),
}


@pytest.mark.slow
@pytest.mark.skipif(MISSING or launch.interpreted, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_where_there_is_no_device(name, capability):
    import triton
    from triton.backends.compiler import GPUTarget

    from onsphere.optim.kernels.triton import coefficients, tiles

    types = {"table": "*i64", "counts": "*i64", "begin": "i32", "count": "i32"}
    types |= dict.fromkeys(["factors", "partial", "coefficients"], "*fp64")
    values = {"SLOTS": 64, "WIDTH": 1, "BLOCK": 256}
    values["FLAGS"] = sum(getattr(coefficients, flag).value for flag in COMPILED[name])
    for kernel in (tiles.turn, tiles.turn_long, tiles.reduce, tiles.plan, tiles.apply):
        names = kernel.arg_names
        source = triton.compiler.ASTSource(
            fn=kernel,
            signature={arg: types.get(arg, "constexpr") for arg in names},
            constexprs={(names.index(arg),): x for arg, x in values.items() if arg in names},
        )
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"]


def told(device):
    """Expect the warning that vectors were left: on a GPU it comes some steps later."""
    return pytest.warns(UserWarning, match="left") if device == "cpu" else nullcontext()


def run(on, name, start, grads, sphere, memory=None, **settings):
    """Take one step per gradient; return weight, momentum, radius and optimizer."""
    with kernels.switched(on):
        w = torch.nn.Parameter(place(start, memory))
        if on:
            assert kernels.known(w, sphere, w.dtype)
        optimizer = make(name, [{"params": [w], "sphere": sphere}], **settings)
        for grad in grads:
            w.grad = place(grad, memory)
            optimizer.step()
            torch.testing.assert_close(w.grad, place(grad, memory), rtol=0, atol=0, equal_nan=True)
    state = optimizer.state[w]
    momentum = state.get("momentum_buffer", state.get("exp_avg"))
    return w.detach(), momentum, state["radius"], optimizer


def near(ours, theirs, size):
    """Whether two tensors are the same to rounding, beside numbers of that size."""
    assert ours.stride() == theirs.stride()
    scale = max(theirs.float().abs().max(), size)
    assert (ours.float() - theirs.float()).abs().max() <= ROUNDING[ours.dtype] * scale


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_wrong_answer_is_seen(dtype):
    with pytest.raises(AssertionError):
        near(torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype) * 1.1, 1.0)


def compare(name, shape, sphere, device, generator, *, memory=None, dtype=torch.float32, **more):
    start = torch.randn(shape, generator=generator).to(device, dtype)
    grads = torch.randn(2, *shape, generator=generator).to(device, dtype)
    fast, slow = (
        run(on, name, start, grads, sphere, memory, lr=0.05, **more) for on in (True, False)
    )
    for ours, theirs in zip(fast[:3], slow[:3], strict=True):
        if theirs is not None:
            near(ours, theirs, 0.1 * grads.float().abs().max())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layout", ["rows", "whole", "groups", "given radius"])
def test_every_update(name, layout, device, generator):
    shape, memory, sphere = LAYOUTS[layout]
    compare(name, shape, sphere, device, generator, memory=memory)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(name, way, device, generator, monkeypatch):
    for setting, value in WAYS[way].items():
        monkeypatch.setattr(launch, setting, value)
    compare(name, (5, 3, 24), ROWS, device, generator, dtype=torch.bfloat16)


@pytest.mark.parametrize("options", TRAVELS)
@pytest.mark.parametrize("ascend", [False, True])
@pytest.mark.parametrize("name", ["SGD Nesterov", "AdamW", "AdamW, moment per vector"])
def test_every_way_to_step(name, options, ascend, device, generator):
    compare(name, (4, 37), ROWS, device, generator, options=options, maximize=ascend)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "shape",
    [(3, 1), (5, 3), (3, 1000), pytest.param((2, 70_000), marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "AdamW, moment per vector"])
def test_every_length_every_way(name, shape, way, device, generator, monkeypatch):
    if way == "registers" and shape[1] > 8192:
        pytest.skip("that long a vector fits no tile")
    for setting, value in WAYS[way].items():
        monkeypatch.setattr(launch, setting, value)
    compare(name, shape, ROWS, device, generator)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("way", "bad"), list(zip(WAYS, [torch.nan, torch.inf, 1e30], strict=True)))
def test_unsound_vectors_keep_all_their_bits(name, way, bad, device, generator, monkeypatch):
    for setting, value in WAYS[way].items():
        monkeypatch.setattr(launch, setting, value)
    start = torch.randn(3, 40, generator=generator).to(device)
    start[1] = 0
    grads = torch.randn(2, 3, 40, generator=generator).to(device)
    with told(device):
        before, old, _, _ = run(True, name, start, grads[:1], ROWS, lr=0.05)
    grads[1, 2, 7] = bad
    with told(device):
        after, momentum, radius, optimizer = run(True, name, start, grads, ROWS, lr=0.05)
    assert torch.equal(after[1:], before[1:])
    assert not torch.equal(after[0], before[0])
    if momentum is not None:
        assert torch.equal(momentum[1:], old[1:])
        assert not torch.equal(momentum[0], old[0])
    assert radius.flatten()[1] == 0
    assert optimizer.skipped == 3  # the zero vector twice


def test_many_tensors_at_once(device, generator):
    shapes = [(3, 5), (0, 7), (70, 9), (2, 700), (1, 9000), (4, 5), (3, 1)]
    starts = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    ends = []
    for on in (True, False):
        with kernels.switched(on):
            weights = [torch.nn.Parameter(start.clone()) for start in starts]
            optimizer = make("AdamW", [{"params": weights, "sphere": ROWS}], lr=0.05)
            for step in range(3):
                for number, (weight, start) in enumerate(zip(weights, starts, strict=True)):
                    # Parameters at different numbers of steps have different bias corrections.
                    weight.grad = None if step < number % 3 else start.flip(0).sin()
                optimizer.step()
            ends.append(weights)
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    found = {(b.kernel, b.block): b.numbers for b in launch._batches(shapes, launch._way)}
    assert found == {
        ("turn", 16): [0, 2, 5, 6],
        ("turn", 1024): [3],
        ("chunked", 1024): [4],
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("ascend", [False, True])
def test_joint_spheres(name, ascend, device, generator):
    joint = Sphere(VectorAxes((0,)), joint=True)
    start = torch.randn(4, 40, generator=generator).to(device)
    grads = torch.randn(2, 4, 40, generator=generator).to(device)
    grads[1, 3] = torch.nan
    ends = []
    for on in (True, False):
        with kernels.switched(on), told(device):
            parts = [torch.nn.Parameter(x.clone()) for x in (start[:, :39], start[:, 39])]
            group = {"params": parts, "sphere": joint}
            optimizer = make(name, [group], lr=0.05, maximize=ascend)
            for grad in grads:
                parts[0].grad, parts[1].grad = grad[:, :39].clone(), grad[:, 39].clone()
                optimizer.step()
            assert optimizer.skipped == 1
            ends.append(torch.cat([p.detach().flatten() for p in parts]))
    assert (ends[0] - ends[1]).abs().max() < 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "centered"), list(zip(ROUNDING, [True, False], strict=True)), ids=str
)
@pytest.mark.parametrize("settings", [{}, {"brake": True}, {"brake": True, "growth": 0.5}], ids=str)
def test_restoring(way, dtype, centered, settings, device, generator, monkeypatch):
    for setting, value in WAYS[way].items():
        monkeypatch.setattr(launch, setting, value)
    sphere = Sphere(VectorAxes((0,)), centered=centered)
    begin = torch.randn(5, 33, generator=generator).to(device, dtype)
    begin[1] = 0
    moved = begin + torch.randn(5, 33, generator=generator).to(device, dtype)
    moved[2, 3], moved[3] = torch.nan, 0
    ends = []
    for on in (True, False):
        with kernels.switched(on):
            held = constrain([begin.clone()], sphere, numbers([begin], sphere))
            record([held])
            held.params[0].copy_(moved)
            left = restore([held], **settings)
            assert int(left) == int(held.skipped) == 3
            ends.append((held.params[0].float(), held.radius))
    for ours, theirs in zip(*ends, strict=True):
        rounding = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype]}
        torch.testing.assert_close(ours, theirs, equal_nan=True, **rounding)
    assert torch.equal(ends[0][0][1], torch.zeros(33, device=device))


@pytest.mark.parametrize("name", [n for n, m in MEMBERS.items() if not m.closure])
@pytest.mark.parametrize("sphere", [ROWS, Sphere()], ids=["rows", "whole"])
def test_members_of_the_contract(name, sphere, device, generator):
    member, goal = MEMBERS[name], target(generator, 4, 6)
    if member.matrices and device == "cuda":
        goal = goal.contiguous()
    goal, start = goal.to(device), torch.randn(4, 6, generator=generator).to(device)
    ends = []
    for on in (True, False):
        with kernels.switched(on):
            weight = torch.nn.Parameter(start.clone())
            optimizer = member.build([weight], sphere)
            losses = train(member, weight, optimizer, goal, 3)
            losses.append(loss_of(weight.detach(), goal).item())
            ends.append(weight.detach())
    assert all(b < a for a, b in itertools.pairwise(losses))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)
    if member.mode != "brake":
        norms = [sphere.axes.norms(x.double()) for x in (*ends, start)]
        torch.testing.assert_close(norms[0], norms[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["SphereSGD", "SphereAdamW", "hard AdamW"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_radius_is_kept(name, dtype, device, generator):
    start = torch.randn(3, 32, generator=generator).to(device, dtype)
    weight = torch.nn.Parameter(start.clone())
    optimizer = MEMBERS[name].build([weight], ROWS)
    for grad in torch.randn(20, 3, 32, generator=generator).to(device, dtype):
        feed(MEMBERS[name], weight, optimizer, grad)
    drift = ROWS.axes.norms(weight.detach().double()) / ROWS.axes.norms(start.double()) - 1
    assert drift.abs().max() < (1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW"])
def test_every_run_gives_the_same_bits(name, device, generator):
    start = torch.randn(2, 40_000, generator=generator).to(device)
    grads = torch.randn(2, 2, 40_000, generator=generator).to(device)
    ends = [run(True, name, start, grads, sphere, lr=0.05)[0] for sphere in (ROWS, Sphere()) * 2]
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[3])


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sphere", [ROWS, Sphere()], ids=["rows", "whole"])
def test_a_step_does_not_wait_for_the_device(name, sphere, generator):
    if MISSING or not here("cuda"):
        pytest.skip("the kernels do not run on this device")
    weight = torch.nn.Parameter(torch.randn(30, 1000, generator=generator).cuda())
    optimizer = make(name, [{"params": [weight], "sphere": sphere}], lr=0.05)
    weight.grad = torch.randn(30, 1000, generator=generator).cuda()
    optimizer.step()  # compiles
    weight.grad[0, 0] = torch.nan
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(optimizer, 130)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="left"):
        take(optimizer, 130)
    assert optimizer.skipped == 260


def take(optimizer, steps):
    for _ in range(steps):
        optimizer.step()


def test_operators_are_sound(device, generator):
    p, g = (torch.randn(3, 8, generator=generator).to(device) for _ in range(2))
    layouts, arguments = [3, 1, 1, 8], [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    settings = [0.1, 0.0, 0.0, 1e-7, 1e-6, 0, 0, 0, 0, 0, 0, 0]
    tests = ("test_schema", "test_faketensor")
    inputs = (
        [p],
        [g],
        [],
        [],
        [torch.zeros(3, 1, device=device)],
        [],
        layouts,
        arguments,
        settings,
    )
    library.opcheck(ops.step, inputs, test_utils=tests)
    parts = ([p], [g], [], [], layouts, arguments, settings)
    library.opcheck(ops.reduce, parts, test_utils=tests)
    coefficients = [torch.ones(3, 6, dtype=torch.float64, device=device)]
    library.opcheck(ops.apply, (*parts[:4], coefficients, *parts[4:]), test_utils=tests)


def test_what_the_kernels_leave_to_pytorch(device):
    matrix = torch.ones(4, 6, device=device)
    assert kernels.known(matrix, ROWS, torch.float32)
    assert not kernels.known(matrix, Sphere(VectorAxes((1,))), torch.float32)
    assert not kernels.known(matrix.double(), ROWS, torch.float64)
    assert not kernels.known(torch.ones(4, 12, device=device)[:, ::2], ROWS, torch.float32)
    with kernels.switched(False):
        assert not kernels.known(matrix, ROWS, torch.float32)


def test_nothing_is_present_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not launch.present.__wrapped__(torch.device("cuda"))
