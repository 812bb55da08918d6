"""torch.compile on a step, in a process of its own: the suite's shape checks cannot be traced."""

import json
import subprocess
import sys

import pytest

NAMES = ("SphereSGD", "SphereAdamW", "on_sphere")
SCRIPT = """
import json
import traceback

import torch
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


found = {}
for name, make in makers.items():
    try:
        check(make)
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


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_gives_the_same_bits(found, name):
    assert not found[name], found[name]
