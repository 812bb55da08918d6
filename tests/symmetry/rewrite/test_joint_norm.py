"""The least norm over whole weights and channels together, against a dense minimizer."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from onsphere.symmetry.claims import Family, Slices
from onsphere.symmetry.rewrite.balancing.joint_norm import (
    Channels,
    Scales,
    against_each_other,
    joint_least_norm,
)
from onsphere.symmetry.rewrite.balancing.least_norm import LeastNorm

ONE = Fraction(1)
STILL = 1e-9


def slices(name: str, exponent: int, axis: int, count: int) -> Slices:
    return Slices(name, Fraction(exponent), (axis,), torch.arange(count)[:, None])


def trade(writer: str, reader: str, count: int, power: int = 1) -> Family:
    """Rows of one weight against columns of another."""
    return Family((slices(writer, 1, 0, count), slices(reader, -power, 1, count)), count)


def chain(seed: int = 0) -> tuple[dict[str, Tensor], list[Family], list[dict[str, Fraction]]]:
    """Three maps, and a fourth that trades with the first as a whole."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3), "b": (5, 4), "c": (2, 5), "d": (3, 3)}
    weights = {
        n: torch.randn(*s, generator=generator, dtype=torch.float64)
        * (2 * torch.randn(s[0], 1, generator=generator, dtype=torch.float64)).exp()
        for n, s in shapes.items()
    }
    families = [trade("a", "b", 4), trade("b", "c", 5, power=2)]
    symmetries = [{"a": ONE, "b": -ONE}, {"b": ONE, "c": -2 * ONE}, {"a": ONE, "d": -ONE}]
    return weights, families, symmetries


def moved(weights: dict[str, Tensor], scales: Scales) -> dict[str, Tensor]:
    found = {n: w * 2.0 ** scales.whole.get(n, 0.0) for n, w in weights.items()}
    shapes = {n: tuple(w.shape) for n, w in weights.items()}
    for family, amounts in scales.channels:
        for n, logs in family.log_factors(amounts, shapes).items():
            found[n] = found[n] * torch.exp2(logs)
    return found


def total(weights: dict[str, Tensor]) -> float:
    return float(sum(w.square().sum() for w in weights.values()))


def solved(weights, families, symmetries, *, octaves: bool = False) -> Scales:
    forms = [{n: ONE} for n in weights] if octaves else []
    whole = LeastNorm(symmetries, weights, octaves=forms)
    return joint_least_norm(whole, [Channels(f, octaves) for f in families], weights, STILL)


def densely_minimized(weights, families, symmetries) -> float:
    """Minimize over all scales at once by Newton's method, without the library's balances."""
    shapes = {n: tuple(w.shape) for n, w in weights.items()}
    counts = [f.count for f in families]

    def value(scales: Tensor) -> Tensor:
        *free, whole = scales.split([*counts, len(symmetries)])
        logs = {n: sum(float(v.get(n, 0)) * u for v, u in zip(symmetries, whole, strict=True))
                for n in weights}  # fmt: skip
        for family, t in zip(families, free, strict=True):
            for s in family.slices:
                along = [1, 1]
                along[s.axes[0]] = shapes[s.name][s.axes[0]]
                logs[s.name] = logs[s.name] + (float(s.exponent) * t).reshape(along)
        return sum((w * logs[n].exp()).square().sum() for n, w in weights.items()).log()

    at = torch.zeros(sum(counts) + len(symmetries), dtype=torch.float64)
    for _ in range(100):
        slope = torch.autograd.functional.jacobian(value, at)
        bend = torch.autograd.functional.hessian(value, at)
        step = -torch.linalg.pinv(bend, rtol=1e-10, hermitian=True) @ slope
        step = step / max(1.0, float(step.abs().max()))
        while float(value(at + step)) > float(value(at)) and float(step.abs().max()) > 1e-12:
            step = step / 2
        at = at + step
        if float(step.abs().max()) < 1e-10:
            break
    return float(value(at).exp())


@pytest.mark.parametrize("seed", range(3))
def test_the_minimum_is_that_of_all_scales_at_once(seed: int) -> None:
    weights, families, symmetries = chain(seed)
    found = total(moved(weights, solved(weights, families, symmetries)))
    assert found == pytest.approx(densely_minimized(weights, families, symmetries), rel=1e-6)
    assert found < total(moved(weights, solved(weights, [], symmetries)))


@pytest.mark.parametrize("octaves", [False, True])
def test_at_the_minimum_nothing_moves(octaves: bool) -> None:
    weights, families, symmetries = chain()
    scales = solved(weights, families, symmetries, octaves=octaves)
    assert scales.channels
    again = solved(moved(weights, scales), families, symmetries, octaves=octaves)
    assert again == Scales({})


def test_powers_of_two_are_whole_for_every_exponent() -> None:
    weights, families, symmetries = chain()
    scales = solved(weights, families, symmetries, octaves=True)
    after = moved(weights, scales)
    for n, w in weights.items():
        octaves = (after[n] / w).log2()
        torch.testing.assert_close(octaves, octaves.round(), atol=0, rtol=0)
    real = total(moved(weights, solved(weights, families, symmetries)))
    assert real <= total(after) < 1.2 * real


def test_a_family_that_would_undo_a_geometric_mean_moves_channels_against_each_other() -> None:
    """A joint sphere {a, c} beside a trade with unequal exponents: together they fall for ever."""
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(4, 4, generator=generator).double() for n in "abc"}
    weights["a"][1] *= 9
    joint = [{"c": ONE, "b": ONE}, {"a": ONE, "b": -2 * ONE}]
    family = trade("a", "b", 4, power=2)
    whole = LeastNorm(joint, weights)
    assert whole.bounded_with([{"a": ONE, "b": -2 * ONE}]) == [False]
    scales = solved(weights, [family], joint)
    ((_, amounts),) = scales.channels
    assert abs(float(amounts.sum())) < 1e-9 < float(amounts.abs().max())
    after = moved(weights, scales)
    assert total(after) < total(moved(weights, solved(weights, [], joint)))
    assert solved(after, [family], joint) == Scales({})


def test_channels_against_each_other_share_one_multiplier() -> None:
    up, down = torch.tensor([1.0, 9.0, 0.0, 4.0]).log(), torch.tensor([2.0, 1.0, 5.0, 3.0]).log()
    t = against_each_other([(1.0, up.double()), (-2.0, down.double())])
    slope = 2 * (up + 2 * t).exp() - 4 * (down - 4 * t).exp()
    assert t[2] == 0
    assert abs(float(t.sum())) < 1e-12
    torch.testing.assert_close(slope[[0, 1, 3]], slope[:1].expand(3))


def test_a_channel_of_zeros_stays() -> None:
    weights, families, symmetries = chain()
    weights["a"][2] = 0
    weights["b"][:, 1] = 0
    ((_, amounts), _) = solved(weights, families, symmetries).channels
    assert amounts[1] == amounts[2] == 0
    assert float(amounts[0]) != 0


def test_families_that_fall_together_stay() -> None:
    """Two families with both signs each, whose sum only shrinks: there is no minimum."""
    weights = {n: torch.ones(2, 2, dtype=torch.float64) for n in "abc"}
    one, two = trade("a", "b", 2), trade("a", "b", 2)
    flipped = (slices("a", -1, 0, 2), slices("b", 1, 1, 2), slices("c", -1, 1, 2))
    scales = solved(weights, [one, replace(two, slices=flipped)], [])
    assert all(bool(t.isfinite().all()) for _, t in scales.channels)
    after = moved(weights, scales)
    assert float(after["c"].min()) > 0.1
    assert total(after) <= total(weights)
