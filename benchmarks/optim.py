"""One step on spheres against torch's fused optimizers, and against peers that are installed."""

import contextlib
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
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


@dataclass(frozen=True)
class _Case:
    """One row of the table.

    Attributes:
        name: of ours.
        shapes: of all tensors; what has one axis is an ordinary parameter.
        sphere: that all others live on.
        ours: makes our optimizer.
        peer: name of the other.
        theirs: makes it.
        threads: of torch; ``None`` leaves them as they are.
    """

    name: str
    shapes: Shapes
    sphere: Sphere
    ours: _Make
    peer: str
    theirs: _Make
    threads: int | None = None


def measure(device: str = "cpu") -> Iterator[Pairing]:
    """Time one step; what has one axis is an ordinary parameter, all else lives on spheres.

    On the CPU every row has two processes of its own: one where ours gets its memory first, and one
    where theirs does. Who comes first is given the scattered pages that others have left, who comes
    second pages that follow each other, and steps through these faster: by a tenth, and more.
    """
    for number, case in enumerate(_cases(device)):
        if device == "cpu":
            yield _in_both_orders(number)
        else:
            yield _compare(case, device, ours_first=True)


def _in_both_orders(number: int) -> Pairing:
    """Return the means of both, with the outermost quartiles."""
    found = []
    for ours_first in (True, False):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            found.append(alone.submit(_measure_case, number, ours_first).result())
    one, other = found
    return Pairing(
        one.name,
        one.peer,
        (one.ours_ms * other.ours_ms) ** 0.5,
        (one.ratio * other.ratio) ** 0.5,
        min(one.low, other.low),
        max(one.high, other.high),
    )


def _measure_case(number: int, ours_first: bool) -> Pairing:
    return _compare(_cases("cpu")[number], "cpu", ours_first=ours_first)


def _cases(device: str) -> list[_Case]:
    adamw = _base(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, fused=True)
    sgd = _base(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True)
    by_adamw, by_sgd = ("AdamW(fused)", adamw), ("SGD(fused)", sgd)
    sphere_adamw = _grouped(SphereAdamW, lr=1e-3, weight_decay=0.0)
    sphere_sgd = _grouped(SphereSGD, lr=1e-3, momentum=0.9)
    gpt2, resnet = gpt2_small(), resnet50()
    wrapped = "on_sphere(AdamW(fused))"
    cases = [
        _Case("SphereAdamW, GPT-2, rows", gpt2, _ROWS, sphere_adamw, *by_adamw),
        _Case("SphereAdamW, GPT-2, whole tensors", gpt2, _WHOLE, sphere_adamw, *by_adamw),
        _Case("SphereAdamW, GPT-2, columns", gpt2, _COLUMNS, sphere_adamw, *by_adamw),
        _Case("SphereAdamW, ResNet-50, filters", resnet, _ROWS, sphere_adamw, *by_adamw),
        _Case("SphereSGD, GPT-2, rows", gpt2, _ROWS, sphere_sgd, *by_sgd),
        _Case("SphereSGD, ResNet-50, filters", resnet, _ROWS, sphere_sgd, *by_sgd),
        _Case(f"{wrapped}, GPT-2, rows", gpt2, _ROWS, _wrapped(), *by_adamw),
        _Case(f"{wrapped}, rotate, GPT-2, rows", gpt2, _ROWS, _wrapped("rotate"), *by_adamw),
    ]
    small = (
        ("SphereAdamW", sphere_adamw, by_adamw),
        ("SphereSGD", sphere_sgd, by_sgd),
        (wrapped, _wrapped(), by_adamw),
    )
    for name, ours, peer in small:
        for threads in (1, 2) if device == "cpu" else (None,):
            full = f"{name}, small MLP, rows" + (f", threads: {threads}" if threads else "")
            cases.append(_Case(full, small_mlp(), _ROWS, ours, *peer, threads))
    for peer_name, theirs in _peers().items():
        ours = sphere_sgd if "SGD" in peer_name else sphere_adamw
        name = "sphere step, ResNet-50, filters"
        cases.append(_Case(name, resnet, _ROWS, ours, peer_name, theirs))
    return cases


def measure_on_cuda() -> Iterator[Pairing]:
    """The same on a CUDA device, where the table's columns run in pure PyTorch."""
    if not torch.cuda.is_available():
        raise SystemExit("optim-cuda needs a CUDA device, and PyTorch sees none")
    return measure("cuda")


def _compare(case: _Case, device: str, *, ours_first: bool) -> Pairing:
    with _threads(case.threads or torch.get_num_threads()):
        makes = {"ours": case.ours, "theirs": case.theirs}
        steps = {}
        for who in makes if ours_first else reversed(makes):
            steps[who] = _stepper(case.shapes, case.sphere, makes[who], device)
            steps[who]()  # makes its state
        cuda = device == "cuda"
        return pair(
            case.name, case.peer, steps["ours"], steps["theirs"], pairs=21, seconds=0.1, cuda=cuda
        )


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
