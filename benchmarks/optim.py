"""One step of the sphere optimizer against torch's fused SGD, and against geoopt if it is there."""

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.pairing import Pairing, pair
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereSGD

_SHAPES = ((64, 3, 7, 7), (64, 64, 3, 3), (128, 128, 3, 3), (256, 256, 3, 3), (512, 512, 3, 3))
_ROWS = Sphere(VectorAxes(index=(0,)))


def measure() -> Iterator[Pairing]:
    """Time one step with momentum on convolution weights, one sphere per filter."""
    ours = _stepper(lambda p: SphereSGD([{"params": p, "sphere": _ROWS}], lr=1e-3, momentum=0.9))
    fused = _stepper(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True))
    yield pair("SphereSGD step, per filter", "torch.optim.SGD(fused=True)", ours, fused)
    if importlib.util.find_spec("geoopt"):
        import geoopt

        def riemannian(params: list[nn.Parameter]) -> torch.optim.Optimizer:
            sphere = geoopt.Sphere()
            points = [geoopt.ManifoldParameter(p.flatten(1), manifold=sphere) for p in params]
            return geoopt.optim.RiemannianSGD(points, lr=1e-3, momentum=0.9)

        yield pair("SphereSGD step, per filter", "geoopt", ours, _stepper(riemannian))


def _stepper(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], object]:
    optimizer = make([nn.Parameter(torch.randn(shape)) for shape in _SHAPES])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = _gradient(parameter)
    return optimizer.step


def _gradient(parameter: Tensor) -> Tensor:
    return torch.randn_like(parameter)
