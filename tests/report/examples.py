"""Documents made by hand: an ordinary one, and one with everything that could go wrong."""

import math
from functools import cache

from onsphere.report import (
    Document,
    Figure,
    Interval,
    Outcome,
    Panel,
    Reference,
    Section,
    Series,
    Statement,
    Table,
)
from onsphere.report.html import render

NAN, INF = math.nan, math.inf
NASTY = "<script>alert(1)</script>\"'&amp; ]]> {{ 7*7 }} $\\frac{$ ‖w‖² 日本 \x00\x1b\ud800"
STEPS = [1.0, 10.0, 100.0, 1000.0]
METHODS = ["none", "BN", "LN", "IN", "GN", "RMS", "WN", "CWN", "SN"]


def growth_panel(method: str) -> Panel:
    norms = [1.0, 1.5, 2.2, 3.3]
    return Panel(
        method,
        "training step",
        "weight norm",
        [
            Series("plain", STEPS, norms, [0.9 * v for v in norms], [1.1 * v for v in norms]),
            Series("sphere", STEPS, [1.0] * 4),
            Series("predicted", STEPS, norms, dashed=True),
        ],
        x_scale="log",
        y_scale="log",
    )


def category_panel() -> Panel:
    points = range(len(METHODS))
    values = [0.5 + 0.01 * i for i in points]
    return Panel(
        "",
        "method",
        "accuracy",
        [
            Series("plain", points, values, [v - 0.1 for v in values], [1.0] * 9, style="points"),
            Series("sphere", points, [v + 0.2 for v in values], style="points"),
        ],
        categories=METHODS,
        references=[Reference("horizontal", 0.9, "usable")],
        y_limits=(0.0, 1.0),
    )


GROWTH = Figure("growth", "Norms grow", "How to read it.", [growth_panel(m) for m in METHODS])
SHORT_GROWTH = Figure("growth", "Norms grow", "How to read it.", GROWTH.panels[:3])
ACCURACY = Figure("accuracy", "Accuracy by method", "Bars span seeds.", [category_panel()])

ODD_PANELS = [
    Panel("no series", "x", "y", []),
    Panel("empty series", "x", "y", [Series("empty", [], [])]),
    Panel("one point", "x", "y", [Series("one", [1.0], [2.0])], x_scale="log", y_scale="log"),
    Panel("only nan", "x", "y", [Series("gone", [1.0, 2.0], [NAN, NAN])], y_scale="log"),
    Panel("gaps", "x", "y", [Series("gaps", [1, 2, 3, 4], [1.0, NAN, 3.0, INF])]),
    Panel(
        "zeros on log axes",
        "x",
        "y",
        [Series("zeros", [0.0, 1.0, 10.0], [1.0, 0.0, -INF], [0, -1, 0], [2, 1, 1], "both")],
        x_scale="log",
        y_scale="log",
        references=[Reference("diagonal", label="y = x"), Reference("vertical", 0.0)],
    ),
    Panel("tiny", "x", "y", [Series("tiny", [1, 2], [1e-300, 3e-300])], y_scale="log"),
    Panel("huge", "x", "y", [Series("huge", [1, 2], [1e300, 3e300])]),
    Panel("constant", "x", "y", [Series("flat", [1, 2], [0.0, 0.0])]),
    Panel("decades", "x", "y", [Series("d", [1, 2], [1e-30, 1e30])], y_scale="log"),
    Panel(NASTY, NASTY, NASTY, [Series(NASTY, [0], [1])], categories=[NASTY]),
]
ODD = Figure("odd", NASTY, NASTY, ODD_PANELS)


def statement(name: str, outcome: Outcome, **more: object) -> Statement:
    texts = ["hypothesis", "quantity", "margin", "rule"]
    given = {text: f"The {text} of {name}" for text in texts}
    intervals = [
        Interval("BN", 0.2, -0.5, 0.9, outcome, "0.2 of it"),
        Interval("LN", 60.0, -INF, INF, Outcome.OPEN),
    ]
    given |= {"outcome": outcome, "effect": "error 3.1×10⁻¹⁵", "intervals": intervals}
    return Statement(name, **(given | more))


def section(name: str, outcome: Outcome = Outcome.HOLDS, **more: object) -> Section:
    texts = ["title", "statement", "prediction", "advice"]
    given = {text: f"The {text} of {name}" for text in texts}
    given |= {"statements": [statement(f"statement {name}", outcome)]}
    return Section(name, **(given | more))


TABLE = Table(
    "Errors",
    ["method", "error", "steps"],
    [["BN", 1.2e-14, 12345], ["LN", NAN, None], [NASTY, INF, -3]],
    "A dash: not measured.",
)
WIDE = Table("Wide", [f"column {i}" for i in range(30)], [[i * 0.1 for i in range(30)]] * 40)

ORDINARY = Document(
    "Normalization, seen on the sphere",
    "Claims, tested.",
    [
        section("growth", figures=[SHORT_GROWTH], tables=[TABLE], conditions=["digits, 3 seeds"]),
        section(
            "stability", Outcome.REVERSED, figures=[ACCURACY], command="onsphere study stability"
        ),
        section("gain", Outcome.OPEN, findings=["Layers disagree."], tables=[WIDE]),
    ],
    {"torch": "2.13.0"},
    ["A quick run."],
    {"PGD": "projected gradient descent"},
)

HOSTILE = Document(
    NASTY,
    NASTY,
    [
        Section(
            NASTY, NASTY, NASTY, NASTY,
            [
                Statement(
                    NASTY, NASTY, NASTY, NASTY, NASTY, Outcome.MIXED, "measured", NASTY,
                    [Interval(NASTY, NAN, -INF, INF, Outcome.OPEN, NASTY)], NASTY,
                ),
                Statement(NASTY, NASTY, NASTY, NASTY, NASTY, Outcome.OPEN),
            ],
            NASTY, NASTY, [NASTY], [NASTY], [ODD],
            [Table(NASTY, [NASTY], [[NASTY]], NASTY), Table("empty", ["a"], [])], NASTY,
        ),
        section(NASTY, figures=[ODD, Figure("none", "No panels", "", [])]),
        section("x" * 300, figures=[]),
    ],
    {NASTY: NASTY, "long": "y" * 300},
    [NASTY],
    {NASTY: NASTY},
)  # fmt: skip
EMPTY = Document("", "", [])
DOCUMENTS = {"ordinary": ORDINARY, "hostile": HOSTILE, "empty": EMPTY}


@cache
def page_of(name: str) -> str:
    """Render a document once for all tests that only look at it."""
    return render(DOCUMENTS[name])
