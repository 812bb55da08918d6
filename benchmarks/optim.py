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
_Grads = dict[nn.Parameter, torch.Tensor]
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

    Both optimizers step the same tensors, with the same gradients and the same moments: whose
    memory was taken first decides how its pages lie, which alone is worth a tenth and more. Every
    row has a process of its own on the CPU, since what others have left scatters pages too.
    """
    for number, case in enumerate(_cases(device)):
        if device == "cpu":
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                yield alone.submit(_measure_case, number).result()
        else:
            yield _compare(case, device)


def _measure_case(number: int) -> Pairing:
    return _compare(_cases("cpu")[number], "cpu")


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


def _compare(case: _Case, device: str) -> Pairing:
    with _threads(case.threads or torch.get_num_threads()):
        params = [nn.Parameter(0.02 * torch.randn(s, device=device)) for s in case.shapes]
        grads: _Grads = {p: 1e-3 * torch.randn_like(p) for p in params}
        optimizers = [make(params, case.sphere) for make in (case.ours, case.theirs)]
        steps = [_stepper(optimizer, grads) for optimizer in optimizers]
        for step in steps:
            step()  # makes its state
        _share_moments(*optimizers)
        cuda = device == "cuda"
        return pair(case.name, case.peer, *steps, pairs=41, seconds=0.1, cuda=cuda)


def _share_moments(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    for param, state in theirs.state.items():
        mine = ours.state.get(param, {})
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if name in state and name in mine:
                assert state[name].stride() == mine[name].stride()
                state[name] = mine[name]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stepper(optimizer: torch.optim.Optimizer, grads: _Grads) -> Callable[[], object]:
    """Step with gradients as a backward pass leaves them: there again before every step."""
    targets = [p for group in optimizer.param_groups for p in group["params"]]
    own = [grads.get(p, 1e-3 * torch.randn_like(p)) for p in targets]

    def step() -> None:
        for param, grad in zip(targets, own, strict=True):
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
