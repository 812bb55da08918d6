"""Names folded into few lines: nothing lost, nothing added."""

from fractions import Fraction
from itertools import product

import pytest

from onsphere.symmetry.rendering.name_ranges import boxes, folded, folded_symmetries, ranges

ONE = Fraction(1)


@pytest.mark.parametrize("count", [1, 5, 30])
def test_boxes_hold_exactly_their_points(count, generator):
    import torch

    drawn = torch.randint(0, 4, (count, 3), generator=generator).tolist()
    points = {tuple(p) for p in drawn}
    inside = [p for box in boxes([tuple(p) for p in drawn]) for p in product(*box)]
    assert len(inside) == len(set(inside))
    assert set(inside) == points


def test_a_full_grid_is_one_line():
    names = [f"stages.{s}.layers.{n}.conv" for s in range(4) for n in range(3)]
    assert folded(names) == ["stages.0-3.layers.0-2.conv"]
    names.remove("stages.2.layers.1.conv")
    assert folded(names) == [
        "stages.{0-1,3}.layers.0-2.conv", "stages.2.layers.{0,2}.conv",
    ]  # fmt: skip


def test_ranges_of_one_of_many_and_of_holes():
    assert [ranges(n) for n in ([3], [0, 1], [0, 2], [1, 2, 3, 7])] == [
        "3", "0-1", "{0,2}", "{1-3,7}",
    ]  # fmt: skip


def test_numbers_inside_words_are_words():
    assert folded(["conv1.weight", "conv2.weight", "w2v.0"]) == [
        "conv1.weight", "conv2.weight", "w2v.0",
    ]  # fmt: skip


def test_alike_layers_share_a_line_and_their_common_start():
    pairs = [
        {f"m.h.{n}.q": ONE, f"m.h.{n}.k": -ONE, f"m.h.{n}.norm.w": Fraction(-1, 2)}
        for n in range(12)
    ]
    assert folded_symmetries(pairs) == ["m.h.0-11: q * a, k / a, norm.w / a^(1/2)"]


def test_names_that_run_apart_are_written_with_a_letter():
    chain = [{f"h.{n}.norm": ONE, f"h.{n + 1}.q": -ONE} for n in range(11)]
    last = {"h.11.norm": ONE, "head": -ONE}
    assert folded_symmetries([*chain, last]) == [
        "h: i.norm * a, i+1.q / a (i = 0-10)",
        "h.11.norm * a, head / a",
    ]


def test_pairs_without_a_rule_stay_apart():
    pairs = [{"a.0": ONE, "b.3": -ONE}, {"a.1": ONE, "b.9": -ONE}, {"a.2": ONE, "b.4": -ONE}]
    assert folded_symmetries(pairs) == ["a.0 * a, b.3 / a", "a.1 * a, b.9 / a", "a.2 * a, b.4 / a"]


def test_a_diagonal_is_no_grid():
    diagonal = [{f"s.{n}.l.{n}.w": ONE} for n in range(3)]
    assert folded_symmetries(diagonal) == ["s.0.l.0.w * a", "s.1.l.1.w * a", "s.2.l.2.w * a"]


def test_many_weights_of_one_symmetry_are_folded_within():
    stem = {"embed": ONE} | {f"h.{n}.{w}": ONE for n in range(32) for w in ("o", "down")}
    assert folded_symmetries([stem]) == ["embed * a, h.0-31.o * a, h.0-31.down * a"]


def test_strange_names_are_written_as_they_are():
    names = ["a#b.0", "a#b.1", "", "0", "1"]
    assert folded(names) == ["a#b.0-1", "", "0-1"]
