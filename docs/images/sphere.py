"""Draw what happens to a weight before a normalization: ``python docs/images/sphere.py``.

Left, one step: the gradient is tangent, so the new weight is longer. Right, the length over a run
of random tangent steps of SGD, whose gradients are as large as 1 / length.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
INKS = {
    "light": {"ink": "#222222", "faint": "#9a9a9a", "blue": "#0d67c1", "red": "#cf370d"},
    "dark": {"ink": "#e4e4e4", "faint": "#8a8a8a", "blue": "#6cb2f5", "red": "#ff9069"},
}


def lengths(rate: float, decay: float, steps: int = 3000, entries: int = 64) -> np.ndarray:
    """Return the length of a weight under SGD with random tangent gradients."""
    chance = np.random.default_rng(0)
    weight = np.ones(entries) / np.sqrt(entries)
    found = []
    for _ in range(steps):
        square = weight @ weight
        found.append(np.sqrt(square))
        gradient = chance.standard_normal(entries) / np.sqrt(entries * square)
        gradient -= (gradient @ weight) / square * weight
        weight = (1 - rate * decay) * weight - rate * gradient
    return np.array(found)


def step(axes: plt.Axes, inks: dict[str, str]) -> None:
    """Draw one step of gradient descent in the plane of weight and gradient."""
    arc = np.linspace(0, 2 * np.pi, 200)
    start, length = 1.15, 0.62
    w = np.array([np.cos(start), np.sin(start)])
    tangent = np.array([w[1], -w[0]])
    new = w + length * tangent
    axes.plot(np.cos(arc), np.sin(arc), color=inks["ink"], lw=1.3)
    outer = np.linalg.norm(new)
    axes.plot(outer * np.cos(arc), outer * np.sin(arc), color=inks["faint"], lw=0.9, ls=(0, (4, 3)))
    arrow = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    for end, origin, color in ((w, (0, 0), "blue"), (new, (0, 0), "blue"), (new, w, "red")):
        axes.annotate("", end, origin, arrowprops={**arrow, "color": inks[color], "lw": 1.8})
    between = np.linspace(start - np.arctan(length), start, 40)
    axes.plot(0.27 * np.cos(between), 0.27 * np.sin(between), color=inks["ink"], lw=1)
    axes.text(0.41, 0.45, "turn", color=inks["ink"], fontsize=9, ha="center")
    axes.text(-0.02, 0.58, "w", color=inks["blue"], fontsize=14, style="italic", weight="bold")
    axes.text(new[0] + 0.09, new[1] - 0.04, "w after the step", color=inks["blue"], fontsize=10.5)
    axes.text(*(w + length * tangent / 2 + (0.03, 0.17)), "−η · gradient,", color=inks["red"])
    axes.text(*(w + length * tangent / 2 + (0.16, 0.04)), "at right angles to w", color=inks["red"])
    axes.text(0, -0.5, "same function anywhere\nalong a ray", ha="center", color=inks["ink"])
    axes.set(xlim=(-1.3, 2.1), ylim=(-1.28, 1.45), aspect="equal")
    axes.axis("off")
    axes.set_title("One step makes the weight longer", color=inks["ink"], fontsize=12)


def run(axes: plt.Axes, inks: dict[str, str]) -> None:
    """Draw the length over a run: without decay, with decay, on the sphere."""
    for found, color, words, style in (
        (lengths(0.1, 0.0), "red", "no decay: it grows", "-"),
        (lengths(0.1, 0.02), "blue", "weight decay: it settles", "-"),
        (np.ones(3000), "ink", "on the sphere: it stays", "--"),
    ):
        axes.plot(found, color=inks[color], lw=1.8, ls=style)
        axes.text(2950, found[-1] + 0.05, words, color=inks[color], ha="right", va="bottom")
    axes.set(xlabel="step", ylabel="length of w", xlim=(0, 3000), ylim=(0.8, 3.1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("and a run decides how long", color=inks["ink"], fontsize=12)


for name, inks in INKS.items():
    style = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"),
        inks["ink"],
    )
    plain = {"svg.hashsalt": "onsphere", "font.family": "DejaVu Sans", "font.size": 10}
    with mpl.rc_context(style | plain):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.2, 3.7), width_ratios=(1.15, 1), layout="constrained"
        )
        step(left, inks)
        run(right, inks)
        picture = HERE / f"sphere-{name}.svg"
        figure.savefig(picture, transparent=True, metadata={"Date": None, "Creator": None})
        text = picture.read_text(encoding="utf-8")
        picture.write_text(
            "\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8"
        )
        plt.close(figure)
