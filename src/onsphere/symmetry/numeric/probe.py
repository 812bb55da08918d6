"""Run a model in float64, with eps at its real value or at almost 0, at chosen weights.

A probe is the numeric half of the analysis: it evaluates outputs at rescaled weights, and the
gradients of random combinations of the outputs. Casts to a smaller dtype inside the model are
lifted, so that the noise is that of float64.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from onsphere._torch.execution import (
    ModelError,
    OutputPicker,
    bare_name,
    call,
    float_outputs,
    gradients_as_used,
    leaf_as,
    numbers,
    plain_execution,
    weights,
)
from onsphere._torch.materialize import unwrapped
from onsphere._torch.memory import times
from onsphere._torch.substitution import kept, unchanged
from onsphere.symmetry.exact.input_sampling import OtherInputs
from onsphere.symmetry.exact.trace import Call, Trace
from onsphere.symmetry.numeric.float64_mode import TINY, Composed, Float64Mode, wide
from onsphere.symmetry.numeric.random_weights import RandomWeights

_SMALL = 100_000
"""Entries of all weights up to which a model is small: it has few tokens to show a thing, and is
looked at more often."""
_LARGE = 1_000_000
"""Entries from which it is large: it takes long, and shows at once on many weights what it does."""
_HUGE = 50_000_000
"""Entries from which every point takes gigabytes, so that as few as possible are drawn."""


@dataclass(frozen=True, eq=False)
class Point:
    """Where a model is evaluated; two points are the same if they are the same object.

    Args:
        state: every parameter and buffer by the model's own name, in float64.
        args: positional inputs.
        kwargs: keyword inputs.
        seed: of the random numbers that the model draws.
    """

    state: Mapping[str, Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    seed: int = 0


class Points:
    """Points that are drawn when they are first asked for, once for all who ask.

    Args:
        drawn: draws them.
    """

    def __init__(self, drawn: Iterable[Point]) -> None:
        self._drawn = iter(drawn)
        self._known: list[Point] = []

    def __iter__(self) -> Iterator[Point]:
        for i in itertools.count():
            if i == len(self._known):
                point = next(self._drawn, None)
                if point is None:
                    return
                self._known.append(point)
            yield self._known[i]


@dataclass(frozen=True)
class Gradients:
    """Gradients of one random combination of the outputs.

    Args:
        by_name: gradient of every weight the output depends on.
        output: Euclidean norm of all outputs together.
        combines: of all outputs, which have gradients and are part of the combination.
    """

    by_name: Mapping[str, Tensor]
    output: float
    combines: Sequence[bool]


@dataclass(frozen=True)
class _Backward:
    """What a backward pass starts from.

    Args:
        leaves: the weights whose gradients are wanted.
        combined: a random combination of the outputs.
        output: Euclidean norm of all outputs together.
        mode: the one in which it runs.
        combines: of all outputs, which have gradients and are part of the combination.
    """

    leaves: Mapping[str, Tensor]
    combined: Tensor
    output: float
    mode: Float64Mode
    combines: Sequence[bool]


class NoGradients(Exception):
    """A model has no gradients: an operation has no derivative, or overwrites what it needs."""


class Probe:
    """A model that can be evaluated in float64 at any weights.

    Args:
        model: the module; it is never changed.
        args: positional inputs.
        kwargs: keyword inputs.
        traced: what the exact analysis said, for the eps sites, the written buffers, and what
            whole-number inputs look up.
        output: picks the tensors to keep fixed.
        seed: seed of everything random here.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        traced: Trace,
        *,
        output: OutputPicker | None = None,
        seed: int = 0,
    ) -> None:
        self.model = unwrapped(model)
        self.traced, self.output = traced, output
        self.generator = torch.Generator().manual_seed(seed)
        parameters, buffers = weights(self.model)
        own = {**parameters, **buffers}
        self.own_name = {bare_name(n): n for n in own}
        self.names = [n for n in self.own_name if n not in traced.written | traced.whole]
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        # Both by whether eps is the real one.
        self._baselines: tuple[WeakKeyDictionary[Point, list[Tensor]], ...] = (
            WeakKeyDictionary(),
            WeakKeyDictionary(),
        )
        self.amplifications: tuple[WeakKeyDictionary[Point, float], ...] = (
            WeakKeyDictionary(),
            WeakKeyDictionary(),
        )
        self._shared: dict[Hashable, Point] = {}
        self.overwritten = {self.own_name[n] for n in traced.overwritten}
        self._given = Point(
            {n: _float64(t) for n, t in state.items()},
            tuple(tree_map(_float64, tuple(args))),
            tree_map(_float64, dict(kwargs)),
        )
        entries = sum(t.numel() for t in self._given.state.values())
        self.small, self.large, self.huge = entries <= _SMALL, entries > _LARGE, entries > _HUGE
        kept = {self.own_name[n] for n in traced.whole if n in self.own_name}
        kept |= {n for n, b in buffers.items() if _is_mask(b)}
        self._moving = set(self.own_name.values()) - kept
        self._buffers = {n for n, _ in self.model.named_buffers()}
        self._random = RandomWeights(
            self._given.state, self._moving, self.generator, variances=self._buffers
        )
        self.others = OtherInputs(
            self._given.args, self._given.kwargs, traced.rows, self._runs, self.generator,
            few=self.large,
        )  # fmt: skip

    def given(self) -> Point:
        """Return the model's own weights and inputs."""
        return self._given

    def redrawn(
        self,
        noise: float = 0.5,
        size: float = 1.0,
        turn: int = 0,
        least: float = 0.0,
        many: bool = False,
        anew: bool = False,
        meet: bool = False,
        vectors: float = 1.0,
    ) -> Point:
        """Return random weights near the model's own (signs of one-signed tensors kept).

        Args:
            noise: how far they move, relative to their size.
            size: factor on matrices; less than 1 opens saturated softmaxes and gates.
            turn: inputs of other lengths and of the given ones take turns.
            least: weights become as large as this that are far smaller, or extremely large.
            many: a large batch of inputs that differ much.
            anew: matrices keep no more than their mean and spread, so that routers send their
                inputs elsewhere.
            meet: inputs look up the same rows several times.
            vectors: factor on vectors, such as biases and gains.

        A symmetry holds everywhere; at special weights (ones, zeros, a closed gate) and at special
        inputs (equal tokens, a single one) more can seem to hold. Masks and weights that the model
        turns into whole numbers stay.
        """
        state = self._random.draw(noise, size, least, anew, vectors)
        return self._with_inputs(state, noise, turn, many, meet)

    def _with_inputs(
        self,
        state: Mapping[str, Tensor],
        noise: float = 0.5,
        turn: int = 0,
        many: bool = False,
        meet: bool = False,
    ) -> Point:
        """Return a point at some weights, with inputs drawn anew."""
        seed = int(torch.randint(2**31, (), generator=self.generator))
        if many:
            return Point(state, *self.many_inputs(), seed)
        return Point(
            state, *self.others.draw(turn, lambda t: self._random.shaken(t, noise), meet), seed
        )

    def given_elsewhere(self, turn: int = 0) -> Point:
        """Return the model's own weights with inputs drawn anew."""
        return self._with_inputs(self._given.state, turn=turn)

    def shared(self, key: Hashable, draw: Callable[[], Point]) -> Point:
        """Return a point at which several tests look: drawn once, where the model is small.

        Args:
            key: tells such points apart.
            draw: draws it.
        """
        if key in self._shared:
            return self._shared[key]
        point = draw()
        if not self.large:
            self._shared[key] = point
        return point

    def on(self, call: Call) -> Point:
        """Return the point of a call, at the model's own weights where it has no others."""
        args, kwargs, state = tree_map(
            _float64, (call.args, dict(call.kwargs), dict(call.state or self._given.state))
        )
        return Point(state, args, kwargs, call.seed)

    def others_like(self, given: Call, turn: int = 0, *, many: bool = False) -> Call:
        """Draw other inputs, in the types of those given.

        Args:
            given: the inputs as they were given.
            turn: inputs of other lengths and of the given ones take turns.
            many: a large batch.
        """
        point = self._with_inputs({}, turn=turn, many=many)
        pair = (given.args, dict(given.kwargs))
        args, kwargs = tree_map(_in_type_of, (point.args, dict(point.kwargs)), pair)
        return Call(args, kwargs, seed=point.seed)

    def in_types(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights and buffers in the types in which the model holds them."""
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {n: t.to(own[n].dtype) for n, t in state.items()}

    def many_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Draw a large batch of inputs that differ much, to reach what few of them do."""
        return self.others.many(self._random.redrawn_like)

    def nudged(self, point: Point, amount: float) -> Point:
        """Return a point with every weight off by a relative ``amount``, as rounding would do.

        The same along the first axis: enough to see the effect, and cheap for large tables.
        """
        state = {
            n: times(t, _normal_like(t[:1], self.generator).mul_(amount).add_(1))
            if n in self._moving and t.ndim
            else t
            for n, t in point.state.items()
        }
        return replace(point, state=state)

    def rescaled(self, point: Point, exponents: Mapping[str, float], base: float = math.e) -> Point:
        """Return the point with every named weight multiplied by ``base`` to its number.

        Whole powers of two pass through every product, root and norm without rounding.
        """
        state = dict(point.state)
        for name, power in exponents.items():
            own = self.own_name[name]
            state[own] = times(state[own], base**power)
        return replace(point, state=state)

    def reached(self, point: Point, names: Sequence[str]) -> set[str]:
        """Return the weights whose uses have any gradient at a point.

        Where contributions cancel, that of each use is still there; where a weight is multiplied
        by 0, none is.
        """
        state, leaves = self._leaves(point, names)
        owners = {id(t): n for n, t in leaves.items()}
        mode = self._mode(False)
        found: set[str] = set()
        with plain_execution(), torch.enable_grad(), _differentiable():
            outputs = [t for t in self._run(point, state, False, mode) if t.requires_grad]
            for node, names_ in _consumers(outputs, owners):
                node.register_hook(partial(_note_reached, found, names_))
            mode.backward = True
            if outputs:
                with mode:
                    torch.autograd.grad(
                        self.combined(outputs), list(leaves.values()), allow_unused=True
                    )
        return found

    def _leaves(
        self, point: Point, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the state of a point in which some weights want gradients, and these weights."""
        state = dict(point.state)
        leaves = {}
        for name in names:
            own = self.own_name[name]
            leaves[name] = state[own] = state[own].detach().requires_grad_()
        return state, leaves

    def drop_opaque(self) -> None:
        """Look no more for gradients of buffers for which an operation has none.

        Raises:
            NoGradients: there are none of the parameters either.
        """
        names = [n for n in self.names if n in self.traced.parameters]
        if self._has_gradients(self.names):
            return
        list(self.gradients(self._given, 1, names=names))
        buffers = [n for n in self.names if n not in names]
        names += [n for n in buffers if self._has_gradients([*names[:1], n])]
        self.names = [n for n in self.names if n in names]

    def _has_gradients(self, names: Sequence[str]) -> bool:
        try:
            list(self.gradients(self._given, 1, names=names))
        except NoGradients:
            return False
        return True

    def outputs(
        self, point: Point, *, real_eps: bool = False, tiny: Sequence[float] = (TINY,)
    ) -> list[Tensor]:
        """Evaluate the model, where asked at its own eps and else with these in turn."""
        mode = self._mode(real_eps, tiny)
        with gradients_as_used(self.model, self.traced.differentiates):
            return [t.detach().clone() for t in self._run(point, point.state, real_eps, mode)]

    def baseline(self, point: Point, *, real_eps: bool = False) -> list[Tensor]:
        """Evaluate the model at a point that is used again: the outputs are remembered."""
        known = self._baselines[real_eps]
        if point not in known:
            known[point] = self.outputs(point, real_eps=real_eps)
        return known[point]

    def gradients(
        self,
        point: Point,
        count: int,
        *,
        names: Sequence[str] | None = None,
        real_eps: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[Gradients]:
        """Yield the gradients of ``count`` random combinations of the outputs.

        Args:
            point: where.
            count: how many.
            names: weights whose gradients are wanted; all without.
            real_eps: leave eps as it is.
            generator: of the combinations, where they are wanted again.
        """
        names = self.names if names is None else names
        for backward in self._backward_passes(point, count, names, real_eps, generator):
            leaves = list(backward.leaves.values())
            with _differentiable(), backward.mode:
                found = torch.autograd.grad(
                    backward.combined, leaves, retain_graph=True, allow_unused=True
                )
            pairs = zip(backward.leaves, found, strict=True)
            by_name = {n: _dense(g) for n, g in pairs if g is not None}
            yield Gradients(by_name, backward.output, backward.combines)

    def watch(
        self,
        point: Point,
        count: int,
        see: Callable[[int, str, Tensor], None],
        *,
        names: Sequence[str] | None = None,
        real_eps: bool = False,
    ) -> list[float]:
        """Show the gradient of every weight, for ``count`` random combinations of the outputs.

        Those of a huge model are dropped one by one, as soon as they were seen.

        Args:
            point: where.
            count: how many.
            see: is shown the number of the combination, the name of the weight and its gradient.
            names: weights whose gradients are shown; all without.
            real_eps: leave eps as it is.

        Returns:
            Norm of all outputs together, once per combination.
        """
        names = self.names if names is None else names
        if not self.huge:
            norms = []
            passes = self.gradients(point, count, names=names, real_eps=real_eps)
            for number, gradients in enumerate(passes):
                for name, g in gradients.by_name.items():
                    see(number, name, g)
                norms.append(gradients.output)
            return norms
        norms = []
        for backward in self._backward_passes(point, count, names, real_eps):

            def shown(leaf: Tensor, name: str, number: int = len(norms)) -> None:
                with no_dispatch():
                    if leaf.grad is not None:
                        see(number, name, _dense(leaf.grad))
                    leaf.grad = None

            hooks: list[RemovableHandle] = [
                leaf.register_post_accumulate_grad_hook(partial(shown, name=name))  # type: ignore[no-untyped-call]
                for name, leaf in backward.leaves.items()
            ]
            leaves = list(backward.leaves.values())
            with _differentiable(), backward.mode:
                torch.autograd.backward(backward.combined, retain_graph=True, inputs=leaves)
            for hook in hooks:
                hook.remove()
            norms.append(backward.output)
        return norms

    def _backward_passes(
        self,
        point: Point,
        count: int,
        names: Sequence[str],
        real_eps: bool,
        generator: torch.Generator | None = None,
    ) -> Iterator["_Backward"]:
        """Run the model once, and yield what several backward passes start from."""
        state, leaves = self._leaves(point, names)
        mode = self._mode(real_eps)
        with plain_execution(), torch.enable_grad(), _differentiable():
            outputs = self._run(point, state, real_eps, mode)
            combines = [t.requires_grad for t in outputs]
            outputs = [t for t in outputs if t.requires_grad]
            if not outputs:
                return
            norm = float(sum(t.detach().abs().square().sum() for t in outputs)) ** 0.5
            mode.backward = True
            for _ in range(count):
                combined = self.combined(outputs, generator)
                yield _Backward(leaves, combined, norm, mode, combines)

    def _runs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether the model takes other inputs, and gives numbers as it does on its own."""
        outputs = self.outputs(Point(self._given.state, args, kwargs), real_eps=True)
        own = self.real_baseline()
        if len(outputs) != len(own):
            return False
        pairs = zip(outputs, own, strict=True)
        return all(bool(a.isfinite().all()) or not bool(b.isfinite().all()) for a, b in pairs)

    def runs(self, point: Point, *, real_eps: bool = False) -> bool:
        """Return whether the model runs at a point."""
        try:
            self.baseline(point, real_eps=real_eps)
        except ModelError:
            return False
        return True

    def real_baseline(self) -> list[Tensor]:
        """Evaluate the model as it is, at the real eps, once."""
        return self.baseline(self._given, real_eps=True)

    def _mode(self, real_eps: bool, tiny: Sequence[float] = (TINY,)) -> Float64Mode:
        traced = self.traced
        return Float64Mode(traced.eps, real_eps, traced.draws, traced.precisions, tiny)

    def _run(
        self, point: Point, state: Mapping[str, Tensor], real_eps: bool, mode: Float64Mode
    ) -> list[Tensor]:

        def enter(path: str) -> None:
            mode.where = bare_name(path)

        copies = {
            n: t.clone() for n, t in state.items()
            if (n in self._buffers and not t.requires_grad) or n in self.overwritten
        }  # fmt: skip
        shared = {
            n: t if t.requires_grad else t.detach() for n, t in state.items() if n not in copies
        }
        fresh = {n: copies[n] if n in copies else shared[n] for n in state}
        if self.traced.differentiates:
            own = dict(self.model.named_parameters())
            fresh |= {n: leaf_as(p, fresh[n]) for n, p in own.items()}
        args, kwargs = tree_map(cloned, (point.args, dict(point.kwargs)))
        outside = unchanged(self.traced.outside)
        differentiable = any(t.requires_grad for t in fresh.values())
        composed = Composed(mode, real_eps) if differentiable else nullcontext()
        with plain_execution(point.seed), outside, mode.keeping(shared.values()), composed:
            result = call(self.model, fresh, args, kwargs, enter, _kept_in_float64)
            return self.outputs_in(result)

    def outputs_in(self, result: Any) -> list[Tensor]:
        """Return what must not change of a result: tensors, and numbers made from weights."""
        found = [_dense(t) for t in float_outputs(result, self.output)]
        return [*found, *(numbers(result, self.output) if self.traced.taken else ())]

    def combined(
        self, outputs: Sequence[Tensor], generator: torch.Generator | None = None
    ) -> Tensor:
        """Return a random combination of all outputs, as one number.

        Autograd takes cotangents as well, and imports sympy to look at them.
        """
        generator = generator or self.generator
        real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in outputs]
        found = [torch.dot(t.reshape(-1), _normal_like(t, generator).reshape(-1)) for t in real]
        return sum((t.to(found[0]) for t in found[1:]), found[0])


def _normal_like(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, dtype=t.dtype, generator=generator).to(t.device)


def _float64(t: Any) -> Any:
    if isinstance(t, Tensor):
        t = t.detach()
        return wide(t)
    return t


def _consumers(outputs: Sequence[Tensor], owners: Mapping[int, str]) -> list[tuple[Any, set[str]]]:
    """Return the nodes behind some outputs that read leaves, and the names of these."""
    found, seen, stack = [], set(), [t.grad_fn for t in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        behind = [n for n, _ in node.next_functions if n is not None]
        names = {owners.get(id(getattr(n, "variable", None)), "") for n in behind} - {""}
        if names:
            found.append((node, names))
        stack += behind
    return found


def _note_reached(
    found: set[str], names: set[str], _: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> None:
    if any(g is not None and bool(g.any()) for g in gradients):
        found |= names


def _in_type_of(drawn: Any, given: Any) -> Any:
    return drawn.to(given.dtype) if isinstance(given, Tensor) else drawn


def _kept_in_float64(t: Tensor) -> Tensor:
    return _float64(kept(t))


def _dense(g: Tensor) -> Tensor:
    """Return a gradient with all its entries, where a table of embeddings names only some."""
    return g.to_dense() if g.layout is not torch.strided else g


def _is_mask(buffer: Tensor) -> bool:
    """Return whether a buffer holds zeros and one other number, or something infinite."""
    if buffer.is_meta or not buffer.numel():
        return False
    low, high = buffer.min(), buffer.max()
    if not bool(low.isfinite() & high.isfinite()):
        return True
    return bool(
        (low < high) & ((low == 0) | (high == 0)) & ((buffer == low) | (buffer == high)).all()
    )


@contextmanager
def _differentiable() -> Iterator[None]:
    """Turn what autograd refuses into one error that says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ModelError, RuntimeError, NotImplementedError) as error:
        said = (str(error) or repr(error)).splitlines()[0].split(": [")[0]
        raise NoGradients(said) from error


def cloned(t: Any) -> Any:
    """Return a copy of a tensor that a model may write into, and anything else as it is."""
    return t.clone() if isinstance(t, Tensor) else t
