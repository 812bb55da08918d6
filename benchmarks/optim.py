"""One step on spheres against torch's fused optimizers, and against peers that are installed."""

import contextlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.pairing import Pairing, pair
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import SphereAdamW, SphereSGD, on_sphere
from onsphere.optim.wrapper import Mode

Shapes = list[tuple[int, ...]]
_Make = Callable[[list[nn.Parameter], Sphere], torch.optim.Optimizer]
_ROWS, _WHOLE, _COLUMNS = Sphere(VectorAxes((0,))), Sphere(), Sphere(VectorAxes((1,)))


def gpt2_small() -> Shapes:
    """The 148 tensors of GPT-2 small, 124 M parameters, with rows as outputs."""
    shapes: Shapes = [(50257, 768), (1024, 768), (768,), (768,)]
    for _ in range(12):
        shapes += [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
        shapes += [(n,) for n in (2304, 768, 3072, 768, 768, 768, 768, 768)]
    return shapes


def resnet50() -> Shapes:
    """The 161 tensors of ResNet-50, 25.6 M parameters."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,), (1000, 2048), (1000,)]
    width = 64
    for blocks, inner in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            convs: Shapes = [(inner, width, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)]
            if block == 0:
                convs.append((4 * inner, width, 1, 1))
            for conv in convs:
                shapes += [conv, (conv[0],), (conv[0],)]
            width = 4 * inner
    return shapes


def small_mlp() -> Shapes:
    """The 20 tensors of ten linear layers, 17 thousand parameters: all is overhead here."""
    widths = (16, 24, 32, 40, 48, 64, 64, 48, 32, 24, 16)
    pairs = itertools.pairwise(widths)
    return [shape for inputs, outputs in pairs for shape in ((outputs, inputs), (outputs,))]


def measure(device: str = "cpu") -> Iterator[Pairing]:
    """Time one step; what has one axis is an ordinary parameter, all else lives on spheres."""
    adamw = _base(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, fused=True)
    sgd = _base(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True)
    sphere_adamw = _grouped(SphereAdamW, lr=1e-3, weight_decay=0.0)
    sphere_sgd = _grouped(SphereSGD, lr=1e-3, momentum=0.9)
    gpt2, resnet = gpt2_small(), resnet50()
    cases: list[tuple[str, Shapes, Sphere, _Make, str, _Make]] = [
        ("SphereAdamW, GPT-2, rows", gpt2, _ROWS, sphere_adamw, "AdamW(fused)", adamw),
        ("SphereAdamW, GPT-2, whole tensors", gpt2, _WHOLE, sphere_adamw, "AdamW(fused)", adamw),
        ("SphereAdamW, GPT-2, columns", gpt2, _COLUMNS, sphere_adamw, "AdamW(fused)", adamw),
        ("SphereAdamW, ResNet-50, filters", resnet, _ROWS, sphere_adamw, "AdamW(fused)", adamw),
        ("SphereSGD, GPT-2, rows", gpt2, _ROWS, sphere_sgd, "SGD(fused)", sgd),
        ("SphereSGD, ResNet-50, filters", resnet, _ROWS, sphere_sgd, "SGD(fused)", sgd),
        ("on_sphere(AdamW(fused)), GPT-2, rows", gpt2, _ROWS, _wrapped(), "AdamW(fused)", adamw),
        (
            *("on_sphere(AdamW(fused)), rotate, GPT-2, rows", gpt2, _ROWS, _wrapped("rotate")),
            *("AdamW(fused)", adamw),
        ),
    ]
    for name, shapes, sphere, ours, peer, theirs in cases:
        yield _compare(name, shapes, sphere, ours, peer, theirs, device)
    small = (
        ("SphereAdamW", sphere_adamw, "AdamW(fused)", adamw),
        ("SphereSGD", sphere_sgd, "SGD(fused)", sgd),
        ("on_sphere(AdamW(fused))", _wrapped(), "AdamW(fused)", adamw),
    )
    for name, ours, peer, theirs in small:
        for threads in (1, 2) if device == "cpu" else (1,):
            full = f"{name}, small MLP, rows" + (f", threads: {threads}" if device == "cpu" else "")
            with _threads(threads):
                yield _compare(full, small_mlp(), _ROWS, ours, peer, theirs, device)
    for peer, theirs in _peers().items():
        ours = sphere_sgd if "SGD" in peer else sphere_adamw
        name = "sphere step, ResNet-50, filters"
        yield _compare(name, resnet, _ROWS, ours, peer, theirs, device)


def measure_on_cuda() -> Iterator[Pairing]:
    """The same on a CUDA device, where the table's columns run in pure PyTorch."""
    if not torch.cuda.is_available():
        raise SystemExit("optim-cuda needs a CUDA device, and PyTorch sees none")
    return measure("cuda")


def _compare(
    name: str, shapes: Shapes, sphere: Sphere, ours: _Make, peer: str, theirs: _Make, device: str
) -> Pairing:
    steps = [_stepper(shapes, sphere, make, device) for make in (ours, theirs)]
    return pair(name, peer, *steps, pairs=21, seconds=0.1, cuda=device == "cuda")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stepper(shapes: Shapes, sphere: Sphere, make: _Make, device: str) -> Callable[[], object]:
    """Step with gradients as a backward pass leaves them: there again before every step."""
    params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    optimizer = make(params, sphere)
    targets = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [1e-3 * torch.randn_like(p) for p in targets]

    def step() -> None:
        for param, grad in zip(targets, grads, strict=True):
            param.grad = grad  # some peers clear it
        optimizer.step()

    return step


def _merged(params: list[nn.Parameter], sphere: Sphere) -> list[dict[str, Any]]:
    vectors, plain = ([p for p in params if (p.ndim > 1) == many] for many in (True, False))
    return [{"params": vectors, "sphere": sphere}, {"params": plain}]


def _grouped(kind: Callable[..., torch.optim.Optimizer], **settings: Any) -> _Make:
    return lambda params, sphere: kind(_merged(params, sphere), **settings)


def _base(kind: Callable[..., torch.optim.Optimizer], **settings: Any) -> _Make:
    return lambda params, _: kind(params, **settings)


def _wrapped(mode: Mode = "hard") -> _Make:
    def make(params: list[nn.Parameter], sphere: Sphere) -> torch.optim.Optimizer:
        base = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0, fused=True)
        return on_sphere(base, {p: sphere for p in params if p.ndim > 1}, mode)

    return make


def _peers() -> dict[str, _Make]:
    found: dict[str, _Make] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("geoopt"):
            import geoopt

            def points(params: list[nn.Parameter]) -> list[nn.Parameter]:
                sphere = geoopt.Sphere()
                return [
                    geoopt.ManifoldParameter(p.detach().flatten(1), manifold=sphere)
                    if p.ndim > 1
                    else p
                    for p in params
                ]

            found["geoopt SGD"] = lambda params, _: geoopt.optim.RiemannianSGD(
                points(params), lr=1e-3, momentum=0.9
            )
            found["geoopt Adam"] = lambda params, _: geoopt.optim.RiemannianAdam(
                points(params), lr=1e-3
            )
        if importlib.util.find_spec("adamp"):
            import adamp

            found["AdamP"] = _base(adamp.AdamP, lr=1e-3)
        if importlib.util.find_spec("heavyball"):
            import heavyball

            found["HyperBallAdamW"] = _base(heavyball.HyperBallAdamW, lr=1e-3)
    return found
