"""torch.compile on a step, in a process of its own: the suite's shape checks cannot be traced."""

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD, on_sphere

rows = Sphere(VectorAxes((0,)))
makers = {
    "SphereSGD": lambda w: SphereSGD([{"params": [w], "sphere": rows}], lr=0.1, momentum=0.9),
    "SphereAdamW": lambda w: SphereAdamW([{"params": [w], "sphere": rows}], lr=0.1),
    "on_sphere": lambda w: on_sphere(torch.optim.SGD([w], lr=0.1), {w: rows}),
}
make = makers[%r]
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
"""


@pytest.mark.parametrize("name", ["SphereSGD", "SphereAdamW", "on_sphere"])
def test_a_compiled_step_gives_the_same_bits(name):
    done = subprocess.run([sys.executable, "-c", SCRIPT % name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
