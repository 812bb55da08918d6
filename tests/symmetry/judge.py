"""Judge what an audit says of a network, by plain evaluations of a copy with other weights.

Nothing here knows units or runs any of the library's code. A claim is put into practice (weights
multiplied by powers of two, moved, replaced) at random weights of many sizes and at every input of
a case, and the output must stay. :mod:`symmetry.misses` looks for what was not claimed.

Multiplying by powers of two does not round, so what it changes is no rounding.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from symmetry.networks import Case
from symmetry.pieces import without_rounding

State = dict[str, Tensor]
Exponents = Mapping[str, Any]
Move = Callable[[State, random.Random], State]
"""Other weights, at which the output must be the same; random numbers come from the second."""

SIZES = (1.0, 0.5, 0.25, 2.0)
STATES = 4
"""At how many random weights a claim is tested."""
FIXED = ("mask", "index", "bins")
"""Buffers with these names mean what they hold, and are not drawn at random."""


class IllConditioned(Exception):
    """No weights were found at which rounding stays rounding: nothing can be compared."""


# --- evaluating ---------------------------------------------------------------------------------


def redrawn(net: nn.Module, seed: int) -> State:
    """Random weights and buffers of a network (variances stay positive), of many sizes.

    Near one set of weights a clamp that is never reached looks like the identity.
    """
    size = SIZES[seed % len(SIZES)]
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, t in [*net.named_parameters(), *net.named_buffers()]:
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        last = name.split(".")[-1]
        if not t.is_floating_point() or last in FIXED or not bool(t.isfinite().all()):
            state[name] = t.detach().clone()
        elif last.endswith("var"):
            state[name] = (0.3 * noise).exp()
        else:
            state[name] = size * (t.detach() + 0.3 * noise)
    return state


def evaluate(net: nn.Module, state: State, x: Sequence[Any], noise: int = 0) -> list[Tensor]:
    """Run a copy of a network at some weights; returns its floating-point outputs.

    What the network draws itself follows from ``noise``.
    """
    copy, slots = copied(net)
    fresh = {n: t.detach().clone() for n, t in state.items()}
    for held, name, key in slots:
        held[name] = fresh[key]
    args = [t.clone() if isinstance(t, Tensor) else t for t in x]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(noise)  # torch.manual_seed, in a tenth of its time
        result = copy(*args)
    outputs = result if isinstance(result, tuple | list) else (result,)
    return [t for t in outputs if t.is_floating_point()]


_COPIES: WeakKeyDictionary[nn.Module, tuple[nn.Module, list[tuple[Any, str, str]]]]
_COPIES = WeakKeyDictionary()


def copied(net: nn.Module) -> tuple[nn.Module, list[tuple[Any, str, str]]]:
    """A copy of a network, and where each of its tensors is held, tied ones in all their places.

    ``torch.func.functional_call`` would corrupt a module that is used twice.
    """
    if net not in _COPIES:
        copy = deepcopy(net)
        for p in copy.parameters():
            p.requires_grad_(False)
        own = {id(t): n for n, t in [*copy.named_parameters(), *copy.named_buffers()]}
        slots = [
            (held, name, own[id(t)])
            for module in copy.modules()
            for held in (module._parameters, module._buffers)
            for name, t in held.items()
            if t is not None
        ]
        _COPIES[net] = (copy, slots)
    return _COPIES[net]


def nudged(state: State, amount: float, seed: int = 0) -> State:
    """Change every weight by a relative amount at random, as rounding would."""
    generator = torch.Generator().manual_seed(seed)
    near = {}
    for n, t in state.items():
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        moving = t.is_floating_point() and n.split(".")[-1] not in FIXED
        near[n] = t * (1 + amount * noise) if moving else t
    return near


def change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest change of an output, relative to the largest entry of that output."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return float("inf")
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.numel():
            moved = torch.where(a == b, 0.0, (a - b).abs().double())
            size = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
            worst = max(worst, float(moved.nan_to_num(float("inf")).max()) / max(size, 1e-300))
    return worst


# --- moves --------------------------------------------------------------------------------------


def _whole(exponents: Exponents) -> Fraction:
    """What makes exponents whole, so that powers of two do not round; huge ones are made small."""
    largest = max(abs(Fraction(e)) for e in exponents.values())
    whole = lcm(*(Fraction(e).denominator for e in exponents.values()))
    return Fraction(whole) if whole * largest <= 8 else 1 / largest


def scaling(symmetry: Exponents, power: int | None = None) -> Move:
    """Multiply every weight by 2 to the power of its exponent times some whole number."""
    whole = _whole(symmetry)

    def move(state: State, r: random.Random) -> State:
        k = whole * (power or r.choice((-6, -4, -2, 2, 4, 6)))
        scaled = {n: state[n] * 2.0 ** float(k * Fraction(e)) for n, e in symmetry.items()}
        return {**state, **scaled}

    return move


def vectors(shape: Sequence[int], axes: Any) -> Tensor:
    """Number of the vector that every entry of a tensor belongs to.

    Entries belong together that share their place along every axis of ``axes.index`` and the number
    of their block along every axis that ``axes.pieces`` cuts into so many blocks.
    """
    ndim = len(shape)
    blocks = {a % ndim: shape[a % ndim] for a in axes.index}
    blocks |= {a % ndim: count for a, count in axes.pieces}
    number = torch.zeros(tuple(shape), dtype=torch.long)
    for axis in sorted(blocks):
        place = torch.arange(shape[axis]) // (shape[axis] // blocks[axis])
        view = place.reshape([-1 if a == axis else 1 for a in range(ndim)])
        number = number * blocks[axis] + view
    return number


def scaling_vectors(exponents: Exponents, axes: Any) -> Move:
    """Multiply every vector of some weights by a power of two of its own."""
    whole = _whole(exponents)

    def move(state: State, r: random.Random) -> State:
        places = {n: vectors(state[n].shape, axes) for n in exponents}
        count = max(int(p.max()) + 1 if p.numel() else 0 for p in places.values())
        k = torch.tensor([2.0 * float(whole) * r.randint(-2, 2) for _ in range(count)]).double()
        scaled = {n: state[n] * 2.0 ** (k[p] * float(exponents[n])) for n, p in places.items()}
        return {**state, **scaled}

    return move


def shifting(name: str, axes: Any) -> Move:
    """Add to every vector of a weight an amount of its own."""

    def move(state: State, r: random.Random) -> State:
        place = vectors(state[name].shape, axes)
        size = float(state[name].abs().mean()) + 1
        amounts = [size * r.gauss(0, 1) for _ in range(int(place.max()) + 1)]
        return {**state, name: state[name] + torch.tensor(amounts).double()[place]}

    return move


def replacing(name: str, inside: Tensor | None = None) -> Move:
    """Put something large and random in the place of a weight, or of a part of it."""

    def move(state: State, r: random.Random) -> State:
        generator = torch.Generator().manual_seed(r.randrange(2**31))
        noise = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
        if state[name].numel() == 0:
            return state
        fresh = r.choice((1.0, 20.0)) * noise * (float(state[name].abs().mean()) + 0.5)
        return {**state, name: fresh if inside is None else torch.where(inside, fresh, state[name])}

    return move


def part_moves(part: Any, shape: Sequence[int]) -> Iterator[Move]:
    """Multiply, or replace, each interval along an axis of a weight."""
    along = [-1 if a == part.axis else 1 for a in range(len(shape))]
    for start, stop in part.intervals:
        place = torch.arange(shape[part.axis]).reshape(along)
        inside = ((start <= place) & (place < stop)).expand(tuple(shape))
        if part.kind == "inert":
            yield replacing(part.name, inside)
        else:
            yield _scaling_inside(part.name, inside)


def _scaling_inside(name: str, inside: Tensor) -> Move:
    def move(state: State, r: random.Random) -> State:
        factor = 2.0 ** r.choice((-4, -2, 2, 4))
        return {**state, name: torch.where(inside, state[name] * factor, state[name])}

    return move


def joined(moves: Sequence[Move]) -> Move:
    """Do one after the other."""

    def move(state: State, r: random.Random) -> State:
        for some in moves:
            state = some(state, r)
        return state

    return move


# --- judging ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Weights and inputs at which rounding stays rounding, and the outputs there.

    What holds for one mask that a network draws may not hold for another, so every place has a
    seed of its own for what is drawn.
    """

    state: State
    x: tuple[Any, ...]
    noise: int
    outputs: list[Tensor]

    def after(self, net: nn.Module, state: State) -> list[Tensor]:
        """Outputs at other weights, on the same inputs and with the same random numbers."""
        return evaluate(net, state, self.x, self.noise)


class Judge:
    """Judges claims about one case.

    Args:
        case: the network and its inputs.
        seed: of the weights at which it is evaluated.
    """

    def __init__(self, case: Case, seed: int = 7) -> None:
        self.case, self.net = case, case.net
        self.tolerance = 1e-4 if case.rough else 1e-8
        self._exact: Judge | None = None
        self.places = self._found(seed)

    def _found(self, seed: int) -> list[Place]:
        """Weights at which the network is well conditioned on some rich input at least."""
        found: list[Place] = []
        used = 0
        for step in range(60):
            state = redrawn(self.net, seed + step)
            places = [
                self.place(state, x, 100 * (seed + step) + number)
                for number, x in enumerate(self.case.inputs)
            ]
            rich = places[: max(len(self.case.rich), 1)]
            if sum(p is not None for p in rich) >= (min(len(rich), 2) if step < 20 else 1):
                found += [p for p in places if p is not None]
                used += 1
            if used == STATES:
                break
        if not found:
            raise IllConditioned
        return found

    def place(self, state: State, x: tuple[Any, ...], noise: int) -> Place | None:
        """Outputs at some weights and inputs, if the network runs, unless it is ill conditioned."""
        try:
            place = Place(state, x, noise, evaluate(self.net, state, x, noise))
        except (ValueError, RuntimeError):
            return None
        outputs = place.outputs
        if not all(bool((t == t).all()) for t in outputs):
            return None
        nudges = (nudged(state, 1e-12), nudged(state, 4e-16, 1), nudged(state, 4e-15, 2))
        for near in nudges:
            if not change(outputs, place.after(self.net, near)) < self.tolerance / 100:
                return None
        # Where a network rounds, tokens may round to the same, and a norm divide by nothing.
        coarse = [place.after(self.net, nudged(state, 2e-3, n)) for n in range(2 * self.case.rough)]
        if any(not change(outputs, near) < 0.3 for near in coarse):
            return None
        return place

    def changed_by(self, move: Move, turns: int = 2, seed: int = 0) -> float:
        """Largest change of the outputs under a move, over what rounding explains."""
        r, worst, told = random.Random(seed), 0.0, False
        for place in self.places:
            for _ in range(turns):
                state = move(place.state, r)
                after = place.after(self.net, state)
                if any(bool((t.isnan() | (t.abs() > 1e30)).any()) for t in after):
                    continue  # too far: numbers have left their range
                moved, told = change(place.outputs, after), True
                if moved > self.tolerance and not self._rounds(place, state, after, moved):
                    worst = max(worst, moved)
            if worst > 1e3 * self.tolerance:
                break
        return worst if told else float("inf")

    def holds(self, symmetry: Exponents) -> bool:
        """Whether a scale symmetry leaves the outputs alone, by small and by large factors."""
        powers = (2, -2, 6, -6)
        return all(self.changed_by(scaling(symmetry, k), 1) <= self.tolerance for k in powers)

    def shows(self, symmetry: Exponents) -> bool:
        """Whether the outputs stay under very large factors, with nothing put down to rounding."""
        r = random.Random(0)
        return all(
            change(p.outputs, p.after(self.net, scaling(symmetry, k)(p.state, r))) <= self.tolerance
            for p in self.places
            for k in (12, -12)
        )

    def _rounds(self, place: Place, state: State, after: list[Tensor], moved: float) -> bool:
        """Whether rounding explains a change: at the new weights it does nearly as much."""
        explained = max(
            change(after, place.after(self.net, nudged(state, 4e-16, seed))) for seed in range(4)
        )
        if explained > 0.03 * moved:
            return True
        if not self.case.rough:
            return False
        # A sum that the network itself rounds to bfloat16 is rounded anew by what is added to it,
        # and a number halfway between two is rounded the other way by the last bit of another.
        bfloat16 = max(
            change(after, place.after(self.net, nudged(state, 2e-3, seed))) for seed in range(4)
        )
        return 3 * bfloat16 > moved

    def false(self, found: Any) -> list[str]:
        """Claims of an audit that fail, in words."""
        claims = list(self._claims(found))
        # Where a network rounds, even a scale adds: of a sum with a bias that has no effect.
        adding = ("inert", "shift", "inert part", *(("scale", "sphere") if found.inert else ()))
        exact = [c for c in claims if c[0] not in adding]
        loose = [c for c in claims if c[0] in adding]
        said = []
        for some in (exact, loose):
            adds = some is loose
            all_moves = joined([m for _, _, m in some])
            together = self.changed_by(all_moves) if some else 0.0
            if together > self.tolerance:
                some = [c for c in some if not (adds and self._rounds_away(c[2]))]
                alone = [(k, what, self.changed_by(m)) for k, what, m in some]
                said += [
                    f"false {kind}, {what}, output changes by {size:.1e}"
                    for kind, what, size in alone
                    if size > self.tolerance
                ]
            rounded = adds and self.case.rough
            # Less is rounding of large moves.
            if not said and not rounded and together > 1e4 * self.tolerance:
                said.append(f"{len(some)} claims fail together, output changes by {together:.1e}")
        return said

    def _rounds_away(self, move: Move) -> bool:
        """Whether a move changes a network that rounds, and not what it would be if it did not.

        Beside a bias that was made large, what is added to it is lost in bfloat16; that the bias
        has no effect is true all the same.
        """
        if not self.case.rough:
            return False
        if self._exact is None:
            net = without_rounding(self.net)
            try:
                self._exact = Judge(replace(self.case, net=net, rough=False))
            except IllConditioned:
                return False
        return self._exact.changed_by(move) <= self._exact.tolerance

    def _claims(self, found: Any) -> Iterator[tuple[str, str, Move]]:
        """Every claim of an audit: its kind, what it says, and the move that it allows."""
        shapes = {n: t.shape for n, t in [*self.net.named_parameters(), *self.net.named_buffers()]}
        scales = [dict(v) for v in found.scale_symmetries]
        scales += [dict(s.exponents) for s in found.rescalings if dict(s.exponents) not in scales]
        for v in scales:
            yield "scale", shown(v), scaling(v)
        for s in found.spheres:
            words = f"{shown(s.exponents)} by {s.axes}"
            yield "sphere", words, scaling_vectors(s.exponents, s.axes)
        for name in found.inert:
            yield "inert", name, replacing(name)
        for s in found.shifts:
            yield "shift", f"{s.name} by {s.axes}", shifting(s.name, s.axes)
        for part in found.parts:
            moves = list(part_moves(part, shapes[part.name]))
            kind = "inert part" if part.kind == "inert" else "part"
            yield kind, f"{part.name} axis {part.axis} {part.intervals}", joined(moves)


def shown(exponents: Exponents) -> str:
    """A symmetry in short."""
    return "{" + ", ".join(f"{n}: {e}" for n, e in exponents.items()) + "}"
