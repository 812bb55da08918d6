"""An audit as a document: what is said on its page, group by group and weight by weight."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction

from onsphere.report.document import (
    Cell,
    Document,
    Figure,
    Panel,
    Reference,
    Section,
    Series,
    Table,
)
from onsphere.report.number import number
from onsphere.symmetry.rendering import advice, text
from onsphere.symmetry.rendering.name_ranges import folded
from onsphere.symmetry.result import AuditResult
from onsphere.version import __version__

_SPHERES = (
    "Each of these weights can be multiplied by any positive number without changing the output: "
    "only its direction counts. “Per row” and the like say that every such part can be "
    "scaled alone."
)
_PARTS = (
    "The whole weight is on no sphere, but each of these parts is: it can be multiplied alone by "
    "any positive number without changing the output."
)
_SHARED = (
    "The weights of one line can be multiplied by the same number, all at once, without changing "
    "the output; one of them alone cannot."
)
_BUFFERS = (
    "The weights and buffers of one line can be scaled at once without changing the output. "
    "Training does not scale buffers, so weight decay is not free to shrink these weights by that."
)
_TRADES = (
    "For every a > 0 this rescaling changes nothing: what some weights gain, others give. Lines "
    "combine: doing two of them after each other changes nothing either."
)
_CHANNELS = (
    "Each channel can be rescaled by an a > 0 of its own: rows of one weight against columns of "
    "the next. Rescalings above that move the same weights are these with one a for all channels."
)
_SHIFTS = "Adding such an amount to these weights, whatever its size, changes nothing."
_SHIFT_FAMILIES = (
    "The weights of one line move together: whatever v is, adding these amounts to all of them at "
    "once changes nothing. “w @ v” is what the weight w makes of v."
)
_INERT = "Whatever values these weights have, the output is the same."
_INERT_PARTS = "Whatever values these parts have, the output is the same; the rest matters."
_UNREACHED = "This input did not reach these weights, so nothing is claimed about them."
_EPS = (
    "Every symmetry is exact when the small constants in normalizations are 0. At their real size "
    "each is broken a little: the leak says by how much the output changes, relative to its size, "
    "when weights are scaled by e = 2.718 along the symmetry."
)
_CAPTION = (
    "One point per symmetry, in the order of the model. The derivative along a symmetry is "
    "measured in float64 with eps near 0, relative to what it could be; it is 0 for a true "
    "symmetry, up to rounding. Leaks above 1% mean that eps takes part in what the model computes."
)


def document(audit: AuditResult) -> Document:
    """Return what the page of an audit says."""
    entries = sum(map(text.size, audit.parameters.values()))
    ways = len(audit.scale_symmetries)
    return Document(
        title=f"Audit of {audit.model}",
        summary=(
            f"{text.counted(len(audit.parameters), 'weight')} with {entries:,} entries in "
            f"{text.MODES[audit.mode]} mode: "
            + (
                "1 way to rescale them changes nothing."
                if ways == 1
                else f"{ways} independent ways to rescale them change nothing."
            )
            + (f" Audited: {audit.note}." if audit.note else "")
        ),
        sections=[*_overview(audit), *_groups(audit), *_eps(audit), *_weights(audit)],
        provenance=_provenance(audit),
        warnings=advice.limits(audit),
    )


def _overview(audit: AuditResult) -> Iterator[Section]:
    counts, entries, merits = Counter[tuple[str, str]](), Counter[tuple[str, str]](), Counter[str]()
    for name in sorted(audit.kinds, key=lambda n: [*advice.KINDS].index(audit.kinds[n])):
        said = advice.KINDS[audit.kinds[name]], audit.decay_of(name)
        counts[said] += 1
        entries[said] += text.size(audit.parameters[name])
        merits[audit.kinds[name]] += 1
    rows: list[list[Cell]] = [
        [kind, counts[kind, effect], entries[kind, effect], effect] for kind, effect in counts
    ]
    columns = ("a weight that", "weights", "entries", "weight decay is")
    yield Section(
        name="overview",
        title="What weight decay does, and what to do",
        statement="Every weight is of one kind, by what is free about its scale.",
        figure_of_merit=", ".join(f"{count} {kind}" for kind, count in merits.items()),
        findings=[a for a in advice.of_model(audit) if a not in advice.limits(audit)],
        tables=[Table("Kinds of weights", columns, rows)],
    )


def _groups(audit: AuditResult) -> Iterator[Section]:
    count = len(audit.own_spheres())
    sets, with_buffers = (len(text.joint_spheres(audit, buffers=b)) for b in (False, True))
    partly, idle = text.part_lines(audit, "sphere"), text.part_lines(audit, "inert")
    listed: tuple[tuple[str, str, str, str, list[str]], ...] = (
        ("spheres", "Scale-invariant weights", _SPHERES,
         text.counted(count, "weight"), text.sphere_lines(audit)),
        ("parts", "Partly scale-invariant weights", _PARTS,
         text.counted(len(partly), "weight"), partly),
        ("joint", "Weights that are scale-invariant together", _SHARED,
         text.counted(sets, "set"), text.joint_lines(audit, buffers=False)),
        ("buffers", "Weights that are scale-invariant together with buffers", _BUFFERS,
         text.counted(with_buffers, "set"), text.joint_lines(audit, buffers=True)),
        ("trades", "Rescaling symmetries", _TRADES,
         text.counted(len(audit.rescalings), "independent rescaling"), text.trade_lines(audit)),
        ("channels", "Rescaling by channel", _CHANNELS,
         text.counted(len(text.traded_families(audit)), "kind"), text.family_lines(audit)),
        ("shifts", "Shift symmetries", _SHIFTS,
         text.counted(len(audit.shifts), "weight"), text.shift_lines(audit)),
        ("shift-families", "Shift families", _SHIFT_FAMILIES,
         text.counted(len(text.joint_shifts(audit)), "kind"), text.joint_shift_lines(audit)),
        ("inert", "Weights without effect", _INERT,
         text.counted(len(audit.inert), "weight"), folded(audit.inert)),
        ("partly-inert", "Weights partly without effect", _INERT_PARTS,
         text.counted(len(idle), "weight"), idle),
        ("unreached", "Weights not reached", _UNREACHED,
         text.counted(len(audit.unreached), "weight"), folded(audit.unreached)),
    )  # fmt: skip
    for name, title, statement, merit, lines in listed:
        if lines:
            yield Section(
                name,
                title,
                statement,
                figure_of_merit=merit,
                findings=[_unbroken(line) for line in lines],
            )


def _unbroken(line: str) -> str:
    """Keep a range of numbers on one line of the page."""
    return re.sub(r"(?<=\d)-(?=\d)", "\u2060-\u2060", line)


def _eps(audit: AuditResult) -> Iterator[Section]:
    if not audit.leaks:
        return
    worst = sorted(audit.leaks, key=lambda x: -x.amount)[:10]
    rows: list[list[Cell]] = [[_unbroken(", ".join(folded(x.exponents))), x.amount] for x in worst]
    large = text.leak_lines(audit)
    yield Section(
        name="eps",
        title="How exact the symmetries are",
        statement=_EPS,
        figure_of_merit=f"largest leak {number(worst[0].amount, 3)}",
        findings=[_unbroken(f"eps takes part in: {line}") for line in large],
        figures=[_leaks(audit)],
        tables=[Table("The largest leaks", ("symmetry of", "change per e-fold"), rows)],
    )


def _leaks(audit: AuditResult) -> Figure:
    leaks = {_key(x.exponents): x.amount for x in audit.leaks}
    found = {_key(s.exponents): s.residual for s in audit.spheres}
    found |= {_key(r.exponents): r.residual for r in audit.rescalings}
    nan = float("nan")
    order = [k for k in map(_key, audit.scale_symmetries) if k in leaks]
    residuals = [found.get(k) for k in order]
    panel = Panel(
        "",
        "symmetry, in the order of the model",
        "relative change",
        [
            Series("leak at the real eps", range(len(order)), [leaks[k] for k in order],
                   style="points", color="measured"),
            Series("derivative along the symmetry at eps near 0", range(len(order)),
                   [nan if r is None else max(r, 1e-20) for r in residuals],
                   style="points", color="plain"),
        ],
        y_scale="log",
        references=[Reference("horizontal", advice.LEAK_THAT_MATTERS, "1%: eps takes part")],
    )  # fmt: skip
    return Figure("leaks", "What eps breaks, and what is exact", _CAPTION, [panel])


def _key(exponents: Mapping[str, Fraction]) -> frozenset[tuple[str, Fraction]]:
    return frozenset(exponents.items())


def _weights(audit: AuditResult) -> Iterator[Section]:
    alone = audit.own_spheres()
    leaks: dict[str, float] = {}
    for leak in audit.leaks:
        for name in leak.exponents:
            leaks[name] = max(leaks.get(name, 0.0), leak.amount)
    rows: list[list[Cell]] = [
        [
            name,
            "×".join(map(str, shape)) or "scalar",
            str(audit.kinds[name]) + (f", {alone[name].granularity}" if name in alone else ""),
            audit.decay_of(name).partition(":")[0],
            leaks.get(name),
            advice.of_weight(audit, name),
        ]
        for name, shape in audit.parameters.items()
    ]
    columns = ("weight", "shape", "kind", "weight decay is", "leak", "advice")
    yield Section(
        name="weights",
        title="Every weight",
        statement="In the order of the model.",
        figure_of_merit=text.counted(len(rows), "weight"),
        tables=[Table("What weight decay does to each weight, and what to do", columns, rows)],
    )


def _provenance(audit: AuditResult) -> dict[str, str]:
    if not audit.certified:
        exact = advice.exactness(audit)
        certified = f"no: on the meta device, without values; {exact}, by the operations"
    else:
        certified = "yes: in float64, by derivatives along each symmetry and by rescaling"
    return {
        "onsphere": __version__,
        "mode": audit.mode,
        "certified on numbers": certified,
        "search by numbers for more": "complete" if audit.complete else "not complete",
        "inputs": " ".join(audit.conditions) or "as given",
        "operations without a rule": ", ".join(sorted({u.name for u in audit.unknown_ops}))
        or "none",
    }
