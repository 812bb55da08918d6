"""torch.compile on a step, watched or not, in another process: shape checks cannot be traced."""

import json
import subprocess
import sys

import pytest

NAMES = ("SphereSGD", "SphereAdamW", "on_sphere")
SCRIPT = """
import json
import sys
import traceback

import torch
import onsphere.monitor
loaded = "torch._dynamo" in sys.modules
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD, on_sphere

rows = Sphere(VectorAxes((0,)))
makers = {
    "SphereSGD": lambda w: SphereSGD([{"params": [w], "sphere": rows}], lr=0.1, momentum=0.9),
    "SphereAdamW": lambda w: SphereAdamW([{"params": [w], "sphere": rows}], lr=0.1),
    "on_sphere": lambda w: on_sphere(torch.optim.SGD([w], lr=0.1), {w: rows}),
}


def check(make):
    torch._dynamo.reset()
    weights = [torch.nn.Parameter(torch.arange(24.0).reshape(4, 6) + 1) for _ in range(2)]
    plain, compiled = (make(weight) for weight in weights)
    compiled_step = torch.compile(compiled.step, backend="eager")
    for _ in range(3):
        grad = torch.randn(4, 6)
        for weight in weights:
            weight.grad = grad.clone()
        plain.step()
        compiled_step()
    assert torch.equal(*weights), weights


def watched():
    torch._dynamo.reset()
    runs = []
    for how in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        net = torch.nn.Linear(6, 4, bias=False)
        net.weight.data = torch.arange(24.0).reshape(4, 6) + 1
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with onsphere.Monitor(net, optimizer, {"weight": rows}, every=2) as monitor:
            step = how(optimizer.step)
            for number in range(4):
                net.weight.grad = torch.full((4, 6), 1.0 + number)
                step()
        runs.append([(s.step, *s.values.flatten().round(4).tolist()) for s in monitor.run.samples])
    assert len(runs[0]) == 2, runs
    assert runs[0] == runs[1], runs


def imported():
    assert not loaded, "import onsphere loads the compiler, which takes as long as all of torch"


found = {}
checks = {name: lambda make=make: check(make) for name, make in makers.items()}
for name, run in {**checks, "watched": watched, "imported": imported}.items():
    try:
        run()
        found[name] = ""
    except Exception:
        found[name] = traceback.format_exc()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """What went wrong with each optimizer, empty for nothing: one process for all of them."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_compiled_step_is_watched_as_any_other(found):
    assert not found["watched"], found["watched"]


def test_the_compiler_is_loaded_by_those_who_compile(found):
    assert not found["imported"], found["imported"]


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_gives_the_same_bits(found, name):
    assert not found[name], found[name]
