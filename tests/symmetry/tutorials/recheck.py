"""Check a row of the table without the library: finite rescales, and the rank of derivatives.

Everything runs in float64 with eps near 0. Each parameter and each persistent float buffer gives
one column: the numeric derivative of the outputs in the logarithm of its scale, at random weights
and random inputs. What these columns leave free, seen on the parameters, are the symmetries.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from symmetry.tutorials.case import Case, Exponents, drawn

EPS = 1e-60
LARGEST_EPS = 0.01
STEP = 2.0**-16
SIZES = (1.0, 0.5, 2.0, 0.25)
State = dict[str, Tensor]


class Exact(TorchDispatchMode):
    """Set eps to almost 0, and keep float64 where a model asks for less."""

    adding = ("add", "add_", "clamp", "clamp_", "clamp_min", "clamp_min_")
    short = (torch.float32, torch.float16, torch.bfloat16)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, args = dict(kwargs or {}), list(args)
        name = func.overloadpacket.__name__
        places = ("eps", "other", "min") if name in self.adding else ("eps",)
        for i, argument in enumerate(func._schema.arguments):
            if argument.name in places:
                if i < len(args) and _is_small(args[i]):
                    args[i] = EPS
                elif _is_small(kwargs.get(argument.name)):
                    kwargs[argument.name] = EPS
        if kwargs.get("dtype") in self.short:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _is_small(value: Any) -> bool:
    return isinstance(value, float) and 0 < value <= LARGEST_EPS


class Bare:
    """A model of the table in float64, run at any weights and inputs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.net = case.model().double()
        held = {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
        self.held = {n: t.detach() for n, t in held.items()}
        self.first = {n: t.clone() for n, t in self.held.items()}
        self.parameters = [n for n, _ in self.net.named_parameters()]
        saved = self.net.state_dict()
        self.buffers = [
            n for n, t in self.net.named_buffers() if n in saved and t.is_floating_point()
        ]

    def weights(self, seed: int) -> State:
        """Draw weights of several sizes; buffers keep their signs and zeros."""
        generator = torch.Generator().manual_seed(seed)
        state = dict(self.first)
        for name in [*self.parameters, *self.buffers]:
            t = self.first[name]
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            if name in self.buffers:
                state[name] = t * (0.3 * noise).exp()
            else:
                state[name] = SIZES[seed % len(SIZES)] * (t + 0.4 * noise)
        return state

    def inputs(self, seed: int) -> Any:
        found = drawn(self.case.rich or self.case.inputs, seed)
        return tree_map(_float64, found)

    def outputs(self, state: State, inputs: Any) -> Tensor:
        """All floating-point numbers that the model gives."""
        args, kwargs = tree_map(_cloned, inputs)
        usual = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            for name, t in self.held.items():
                t.copy_(state[name])
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float64)
            try:
                with Exact():
                    result = self.net(*args, **kwargs)
            finally:
                torch.set_default_dtype(usual)
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and _is_real(t)]
        return torch.cat([_real(t.detach()).flatten() for t in found])


def _is_real(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _float64(t: Any) -> Any:
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def _cloned(t: Any) -> Any:
    return t.clone() if isinstance(t, Tensor) else t


def rescaled(state: State, exponents: Mapping[str, Any], factor: float) -> State:
    return {n: t * factor ** float(exponents[n]) if exponents.get(n) else t
            for n, t in state.items()}  # fmt: skip


def change(bare: Bare, move: Callable[[State], State], seeds: Sequence[int]) -> float:
    """Return the largest relative change of the output under a change of the weights."""
    worst = 0.0
    for seed in seeds:
        state, inputs = bare.weights(seed), bare.inputs(seed)
        before, after = bare.outputs(state, inputs), bare.outputs(move(state), inputs)
        worst = max(worst, float((after - before).abs().max() / before.abs().max()))
    return worst


def change_under(bare: Bare, exponents: Exponents, seeds: Sequence[int] = range(4)) -> float:
    """Rescale by powers of two, up and down."""
    return max(
        change(bare, lambda s, f=factor: rescaled(s, exponents, f), seeds) for factor in (4.0, 0.25)
    )


def replaced(name: str, seed: int = 5) -> Callable[[State], State]:
    """Put random numbers in the place of one weight."""

    def move(state: State) -> State:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
        return {**state, name: state[name] + noise}

    return move


def sliced(name: str, axis: int, pieces: int, seed: int = 5) -> Callable[[State], State]:
    """Rescale consecutive pieces of a weight along an axis, each by its own power of two."""

    def move(state: State) -> State:
        t = state[name]
        generator = torch.Generator().manual_seed(seed)
        powers = torch.randint(-2, 3, (pieces,), generator=generator)
        powers[0], powers[-1] = 1, -1
        factors = (2.0**powers).repeat_interleave(t.shape[axis] // pieces)
        shape = [-1 if a == axis % t.ndim else 1 for a in range(t.ndim)]
        return {**state, name: t * factors.reshape(shape)}

    return move


def how_fine(bare: Bare, name: str) -> str:
    """Say in one word how a sphere divides: along one axis entry by entry, in pieces, or not."""
    shape = bare.first[name].shape
    for axis, length in enumerate(shape):
        if length > 1 and change(bare, sliced(name, axis, length), range(4)) < 1e-8:
            return "filter" if len(shape) > 2 else "row" if axis == 0 else "column"
    for pieces in range(2, shape[0]):
        if shape[0] % pieces == 0 and change(bare, sliced(name, 0, pieces), range(4)) < 1e-8:
            return "head"
    return "whole tensor"


def free_directions(bare: Bare, draws: int = 8, combinations: int = 6) -> Tensor:
    """Return all symmetries as the numbers show them: orthonormal rows over the parameters."""
    unknowns = [*bare.parameters, *bare.buffers]
    rows: list[Tensor] = []
    seen = 0
    for seed in range(400):
        if len(rows) >= len(unknowns) + 4 and seen >= draws:
            break
        state, inputs = bare.weights(seed), bare.inputs(seed)
        y = bare.outputs(state, inputs)
        generator = torch.Generator().manual_seed(seed)
        count = min(combinations, len(y))
        mix = torch.randn(count, len(y), generator=generator, dtype=torch.float64) / y.norm()
        slopes = [
            [mix @ _slope(bare, state, inputs, name, k * STEP) for name in unknowns] for k in (1, 2)
        ]
        near, far = (torch.stack(columns, 1) for columns in slopes)
        size = near.abs().amax(1)
        smooth = (near - far).abs().amax(1) <= 1e-8 * size + 1e-10  # no kink was crossed
        clear = smooth & (size > 1e-3)  # and it is no rounding beside a saturated output
        rows += list((4 * near - far)[clear] / 3)
        seen += bool(clear.any())
    if len(rows) < len(unknowns) + 4:
        raise ArithmeticError(f"{bare.case.name}: the slopes do not settle")
    matrix = torch.stack(rows)
    matrix = matrix / matrix.abs().amax(1, keepdim=True)
    scale = matrix.abs().amax(0)
    scale = torch.where(scale > 1e-7, scale, torch.inf)
    _, s, vh = torch.linalg.svd(matrix / scale, full_matrices=True)
    shares = s / s[0]
    if bool(((shares > 1e-7) & (shares < 1e-5)).any()):
        raise ArithmeticError(f"{bare.case.name}: no clear rank, {shares.tolist()}")
    null = vh[shares <= 1e-7] / torch.where(scale.isinf(), 1.0, scale)
    _, s, vh = torch.linalg.svd(null[:, : len(bare.parameters)], full_matrices=False)
    return vh[s > 1e-6 * s.max()] if len(s) else vh


def _slope(bare: Bare, state: State, inputs: Any, name: str, step: float) -> Tensor:
    above, below = (
        bare.outputs({**state, name: state[name] * (1 + h)}, inputs) for h in (step, -step)
    )
    return (above - below) / (2 * step)


def more_by_trying(bare: Bare, basis: Sequence[Exponents]) -> list[Exponents]:
    """Try all small whole exponents beyond a basis; return those that change nothing."""
    rows = reduced(basis, bare.parameters)
    pivots = {min(bare.parameters.index(n) for n in row) for row in rows}
    rest = [n for i, n in enumerate(bare.parameters) if i not in pivots]
    found: list[Exponents] = []
    points = [(bare.weights(s), bare.inputs(s)) for s in range(4)]
    before = [bare.outputs(*point) for point in points]
    for exponents in product((0, 1, -1, 2, -2), repeat=len(rest)):
        first = next((e for e in exponents if e), 0)
        if first <= 0:
            continue
        tried = dict(zip(rest, exponents, strict=True))
        if all(
            float((bare.outputs(rescaled(s, tried, 2.0), x) - y).abs().max()) <= 1e-9
            for (s, x), y in zip(points, before, strict=True)
        ):
            found.append(tried)
    return found


def reduced(vectors: Sequence[Exponents], order: Sequence[str]) -> list[dict[str, Fraction]]:
    """Return the reduced echelon form of the vectors, seen on the named parameters: their span."""
    left = [{n: Fraction(v[n]) for n in order if v.get(n)} for v in vectors]
    done: list[dict[str, Fraction]] = []
    for name in order:
        pivot = next((v for v in left if v.get(name)), None)
        if pivot is None:
            continue
        left.remove(pivot)
        pivot = {n: e / pivot[name] for n, e in pivot.items()}
        left = [_without(v, pivot, name) for v in left]
        done = [*(_without(v, pivot, name) for v in done), pivot]
    return [{n: v[n] for n in order if v.get(n)} for v in done]


def _without(v: dict[str, Fraction], pivot: dict[str, Fraction], name: str) -> dict[str, Fraction]:
    share = v.get(name, Fraction(0))
    mixed = {n: v.get(n, Fraction(0)) - share * pivot.get(n, Fraction(0)) for n in {*v, *pivot}}
    return {n: e for n, e in mixed.items() if e}


def in_words(bare: Bare, directions: Tensor) -> list[dict[str, str]]:
    """Write numeric directions as fractions, in reduced echelon form, for people."""
    rows = directions.clone()
    kept: list[int] = []
    for column in range(rows.shape[1]):
        free = [i for i in range(len(rows)) if i not in kept]
        if not free:
            break
        best = max(free, key=lambda i: abs(float(rows[i, column])))
        if abs(float(rows[best, column])) < 1e-5:
            continue
        rows[best] = rows[best] / rows[best, column].clone()
        for i in range(len(rows)):
            if i != best:
                rows[i] = rows[i] - rows[i, column] * rows[best]
        kept.append(best)
    return [
        {n: str(Fraction(float(e)).limit_denominator(12))
         for n, e in zip(bare.parameters, rows[i], strict=True) if abs(float(e)) > 1e-5}
        for i in kept
    ]  # fmt: skip
