from itertools import combinations

import numpy as np
import pytest

from onsphere.report import Figure, Panel, Series
from onsphere.report.drawing.palette import METHODS, VARIANTS, Look, palette_of
from report.examples import ACCURACY, GROWTH

# Machado, Oliveira and Fernandes 2009, severity 1, acting on linear RGB.
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color: str, sight: np.ndarray) -> np.ndarray:
    srgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(sight @ linear, 0, 1) / TO_XYZ.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def smallest_difference(looks: dict[str, Look], sight: np.ndarray) -> float:
    pairs = combinations([look.color for look in looks.values()], 2)
    return min(float(np.linalg.norm(lab(a, sight) - lab(b, sight))) for a, b in pairs)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("looks", [METHODS, VARIANTS], ids=["methods", "variants"])
def test_colors_differ_for_every_sight(looks, sight):
    assert smallest_difference(looks, SIGHT[sight]) > 20


def test_red_and_green_would_be_caught():
    traffic_light = {"a": Look("#a05020", "o"), "b": Look("#607020", "o")}
    assert smallest_difference(traffic_light, SIGHT["all cones"]) > 20
    assert smallest_difference(traffic_light, SIGHT["deuteranopia"]) < 20


@pytest.mark.parametrize("looks", [METHODS, VARIANTS], ids=["methods", "variants"])
def test_colors_stand_out_from_white(looks):
    assert max(lab(look.color, np.eye(3))[0] for look in looks.values()) < 76


def test_methods_have_their_own_markers():
    assert len({look.marker for look in METHODS.values()}) == len(METHODS)


def figure_of(*labels: str) -> Figure:
    return Figure("f", "", "", [Panel("", "x", "y", [Series(name, [0], [1]) for name in labels])])


def test_known_keys_look_the_same_in_every_document():
    alone, among = palette_of([figure_of("BN")]), palette_of([GROWTH, figure_of("BN", "new")])
    assert alone["BN"] == among["BN"] == METHODS["BN"]


@pytest.mark.parametrize("count", [2, 10, 12, 30])
def test_unknown_keys_of_one_figure_look_different(count):
    names = [f"key {i}" for i in range(count)]
    palette = palette_of([ACCURACY, figure_of(*METHODS, "plain"), figure_of(*names)])
    assert len({palette[name] for name in names}) == count


def test_unknown_keys_keep_their_look_over_figures():
    first, second = figure_of("PGD", "DLR"), figure_of("DLR", "BN", "other")
    palette = palette_of([first, second])
    assert palette["DLR"] == palette_of([first, second, figure_of("x")])["DLR"]
    assert len({palette[k].color for k in ("DLR", "BN", "other")}) == 3
