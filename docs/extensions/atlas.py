"""The atlas: what audits found in many architectures, as one list that can be searched.

``{atlas} records.json`` in a page draws the records of a file beside it. They are made by
``python -m benchmarks.atlas``; to draw them needs none of the libraries. The page works without a
script, and its script (``static/atlas.js``: search, filters, order) asks for nothing from outside.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

Record = Mapping[str, Any]

KINDS = {
    "scale-invariant": ("sphere", "on a sphere of its own"),
    "scale-invariant together": ("joint", "on a joint sphere"),
    "rescaling": ("trade", "trades scale"),
    "scale-dependent in part": ("part", "scale is part of the function in one part"),
    "tied to frozen weights or buffers": ("fixed", "tied to frozen weights or buffers"),
    "scale-dependent": ("fixed", "scale is part of the function"),
    "not known": ("unreached", "not known"),
    "inert": ("inert", "no effect"),
    "frozen": ("unreached", "frozen"),
    "unreached": ("unreached", "not reached"),
}
"""Kind of a weight -> its class in the style sheet, and what stands in the legend."""
COLUMNS = {
    "spheres": ("spheres", "weights on spheres of their own"),
    "joint": ("joint", "joint spheres"),
    "trades": ("trades", "rescaling symmetries of whole weights"),
    "families": ("by channel", "kinds of rescaling that hold for each channel by itself"),
    "inert": ("inert", "weights without effect"),
}
"""Number of a row -> its heading, and what it counts."""
PARTS = {
    "spheres": "On spheres of their own: only the direction counts",
    "joint": "Joint spheres: scaling all of these at once changes nothing",
    "trades": "Rescaling symmetries: for any a > 0 this changes nothing",
    "families": "By channel: each channel by an a > 0 of its own",
    "shifts": "Shifts: adding such amounts changes nothing",
    "inert": "Inert: no effect on the output",
    "unreached": "Not reached by the input: nothing is claimed",
}
"""Part of an audit -> what it says."""


ROUNDING = 1e-12
"""Leaks below this are the rounding of float64."""


def drawn(data: Mapping[str, Any]) -> str:
    """Return the records as HTML; all text in them is escaped.

    Args:
        data: what ``benchmarks.atlas`` wrote: versions and records.
    """
    records = list(data["records"].values())
    return "\n".join([
        '<div class="atlas">',
        _totals(records, data["listed"]),
        _controls(records),
        _legend(),
        _head(),
        '<div class="atlas-rows">',
        *(_row(record) for record in records),
        "</div>",
        '<p class="atlas-none" hidden>No architecture here has all of these words. Audit your own: '
        "<code>onsphere audit timm:NAME</code>, <code>hf:TYPE</code> or "
        "<code>train.py:build</code>.</p>",
        f'<p class="atlas-made">Made with {escape(_versions(data["made_with"]))}.</p>',
        "</div>",
    ])  # fmt: skip


def _totals(records: Sequence[Record], listed: int) -> str:
    done = [r for r in records if "failed" not in r]
    certified = sum(r["certified"] for r in done)
    unknown = sum(bool(r["unknown"]) for r in done)
    libraries = Counter(r["library"] for r in records)
    of = ", ".join(f"{count} of {library}" for library, count in libraries.items())
    failed = len(records) - len(done)
    left = listed - len(records)
    missing = f" {left} more are listed, and were not run yet." if left > 0 else ""
    return (
        f'<p class="atlas-totals"><strong>{len(records)} architectures</strong>: {escape(of)}. '
        f"{_many(certified)} audited with certificates, {_many(len(done) - certified)} exactly "
        f"without memory; {_many(failed)} could not be audited, and {_many(unknown)} had an "
        f"operation that the audit does not know.{missing}</p>"
    )


def _versions(made_with: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in made_with.items())


def _many(count: int) -> str:
    return "none" if count == 0 else str(count)


def _controls(records: Sequence[Record]) -> str:
    libraries = dict.fromkeys(r["library"] for r in records)
    norms = sorted({n for r in records for n in r.get("norms", ())}, key=str.lower)
    states = ["certified", "exact", "failed"]
    present = {_state(r) for r in records}
    return (
        '<form class="atlas-controls" hidden>'
        '<input type="search" name="q" aria-label="Search the atlas" autocomplete="off" '
        'placeholder="Your architecture: resnet, llama, U-Net …">'
        + _choice("library", "all libraries", libraries)
        + _choice("norm", "any normalization", norms)
        + _choice("state", "certified or not", [s for s in states if s in present])
        + '<label class="atlas-order">order <select name="order">'
        + "".join(
            f'<option value="{value}">{words}</option>'
            for value, words in (
                ("", "best match"), ("name", "name"), ("share", "share on spheres"),
                ("spheres", "weights on spheres"), ("trades", "trades"), ("entries", "size"),
                ("seconds", "seconds"),
            )
        )
        + '</select></label><output class="atlas-count" aria-live="polite"></output></form>'
    )  # fmt: skip


def _choice(name: str, everything: str, values: Iterator[str] | Any) -> str:
    options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
    return (
        f'<select name="{name}" aria-label="{everything}"><option value="">{everything}</option>'
        f"{options}</select>"
    )


def _legend() -> str:
    items = "".join(
        f'<li><span class="atlas-{css}"></span>{words}</li>' for css, words in KINDS.values()
    )
    return f'<ul class="atlas-legend">{items}</ul>'


def _head() -> str:
    cells = "".join(
        f'<span title="{explained}">{heading}</span>' for heading, explained in COLUMNS.values()
    )
    return (
        '<div class="atlas-head" aria-hidden="true"><span>architecture</span>'
        f"<span>share of its numbers</span>{cells}</div>"
    )


def _state(record: Record) -> str:
    if "failed" in record:
        return "failed"
    return "certified" if record["certified"] else "exact"


def _row(record: Record) -> str:
    state = _state(record)
    title = f"<code>{escape(record['name'])}</code>"
    model = record.get("model", "").lstrip("_")
    under = record.get("about") or (model if model.lower() != record["name"] else "")
    named = (
        f'<span class="atlas-name">{title}<small>{escape(_joined(record, under))}</small></span>'
    )
    if state == "failed":
        middle = f'<span class="atlas-why">not audited: {escape(record["failed"])}</span>'
        inner = _command(record)
    else:
        middle = _bar(record) + "".join(_cell(record, key) for key in COLUMNS)
        inner = "".join(_details(record))
    return (
        f'<details class="atlas-row" {_data(record, state)}><summary>{named}{middle}</summary>'
        f'<div class="atlas-detail">{inner}</div></details>'
    )


def _joined(record: Record, under: str) -> str:
    more = len(record["relatives"])
    others = f"{more} more of its module" if more else ""
    return " · ".join(filter(None, (record["library"], under, others)))


def _data(record: Record, state: str) -> str:
    """Write what the script searches, filters and sorts by."""
    norms = record.get("norms", [])
    words = [record["name"], record["library"], record.get("model", ""), record["about"], *norms]
    words += record["relatives"]
    values = {
        "words": " ".join(words).lower(),
        "library": record["library"],
        "norm": "|".join(norms),
        "state": state,
        "name": record["name"].lower(),
        "share": f"{_share(record, 'scale-invariant'):.4f}",
        "spheres": _count(record, "spheres"),
        "trades": record.get("trades", 0),
        "entries": record.get("entries", 0),
        "seconds": record.get("seconds", 0),
    }
    return " ".join(f'data-{key}="{escape(str(value))}"' for key, value in values.items())


def _share(record: Record, kind: str) -> float:
    entries = record.get("entries", 0)
    return record["kinds"].get(kind, (0, 0))[1] / entries if entries else 0.0


def _count(record: Record, key: str) -> int:
    if "failed" in record:
        return 0
    if key in ("spheres", "inert"):
        return record["kinds"].get("scale-invariant" if key == "spheres" else "inert", (0, 0))[0]
    return record[key]


def _bar(record: Record) -> str:
    if unknown := record["kinds"].keys() - KINDS:
        raise ValueError(f"kinds of weights that the atlas has no word for: {sorted(unknown)}")
    found = {kind: _share(record, kind) for kind in KINDS if kind in record["kinds"]}
    parts = "".join(
        f'<span class="atlas-{KINDS[kind][0]}" style="flex-grow:{max(share, 1e-3):.4f}"></span>'
        for kind, share in found.items()
    )
    said = ", ".join(f"{_percent(s)} {KINDS[kind][1]}" for kind, s in found.items())
    return f'<span class="atlas-bar" role="img" aria-label="{said}" title="{said}">{parts}</span>'


def _percent(share: float) -> str:
    return "under 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def _cell(record: Record, key: str) -> str:
    count, heading = _count(record, key), COLUMNS[key][0]
    css = "atlas-number" if count else "atlas-number atlas-zero"
    return f'<span class="{css}">{count}<small> {heading}</small></span>'


def _details(record: Record) -> Iterator[str]:
    norms = f" Normalization: {', '.join(record['norms'])}." if record["norms"] else ""
    note = f", {record['note']}" if record["note"] else ""
    mode = {"train": "training", "eval": "evaluation"}[record["mode"]]
    yield (
        f"<p><code>{escape(record['model'])}</code> in {mode} mode{escape(note)}: "
        f"{record['weights']} weights with {_thousands(record['entries'])} numbers, "
        f"{record['symmetries']} scale symmetries of whole weights.{escape(norms)}</p>"
    )
    yield _command(record)
    if record["relatives"]:
        names = ", ".join(record["relatives"])
        yield f'<p class="atlas-relatives">Of the same module: {escape(names)}.</p>'
    yield "<dl>"
    for key, words in PARTS.items():
        lines = record["lines"].get(key)
        if lines:
            shown = "".join(f"<li>{_line(line)}</li>" for line in lines)
            counted = _counted(record, key)
            yield f"<dt>{escape(words)}{counted}</dt><dd><ul>{shown}</ul></dd>"
    yield "</dl>"
    yield f"<p>{' '.join(_certificate(record))}</p>"


def _counted(record: Record, key: str) -> str:
    if key == "families":
        return f" ({record['families']}, for {_thousands(record['channels'])} channels)"
    if key == "spheres":
        return f" ({', '.join(f'{n} {words}' for words, n in record['granularity'].items())})"
    return f" ({_count(record, key)})" if key in record or key in COLUMNS else ""


def _line(line: str) -> str:
    return escape(line) if line.startswith("and ") else f"<code>{escape(line)}</code>"


def _certificate(record: Record) -> Iterator[str]:
    if record["certified"]:
        yield "Certified by runs in float64 with eps near 0."
        if (record["leak"] or 0.0) > ROUNDING:
            yield (
                "At the model's own eps, scaling by e = 2.718 changes the output by at most "
                f"{record['leak']:.0e} of its size."
            )
    else:
        yield "Exact, by the operations that the model runs; not certified on numbers."
        yield "Of weights without effect and shifts those that the operations show are listed."
    if record.get("uncertified"):
        yield f"With certificates: {escape(record['uncertified'])}."
    yield from (escape(limit) for limit in record["limits"])
    if record["unknown"]:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in record["unknown"])
        yield f"<strong>Operations that the audit does not know: {names}.</strong>"
    yield f"{record['seconds']:g} s on one core."


def _command(record: Record) -> str:
    return f'<div class="highlight"><pre>{escape(record["command"])}</pre></div>'


def _thousands(count: int) -> str:
    return f"{count:,}".replace(",", "\u202f")


class Atlas(Directive):
    """Draws the records of a file beside the page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the page's list; the page is made anew when the file changes."""
        env = self.state.document.settings.env
        path = Path(env.doc2path(env.docname)).parent / self.arguments[0]
        env.note_dependency(str(path))
        env.metadata[env.docname]["atlas"] = "yes"
        data = json.loads(path.read_text(encoding="utf-8"))
        return [nodes.raw("", drawn(data), format="html")]


def _with_script(app: Sphinx, page: str, _template: str, _context: Any, _tree: Any) -> None:
    if app.env.metadata.get(page, {}).get("atlas"):
        app.add_js_file("atlas.js", loading_method="defer")
        app.add_css_file("atlas.css")


def setup(app: Sphinx) -> dict[str, Any]:
    """Offer ``{atlas}``."""
    app.add_directive("atlas", Atlas)
    app.connect("html-page-context", _with_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
