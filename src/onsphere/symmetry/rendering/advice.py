"""What to do with a model's weights, in plain words."""

from collections.abc import Iterable

from onsphere.symmetry.claims import Kind, Leak, Rescaling, ScaleInvariance
from onsphere.symmetry.rendering.name_ranges import folded
from onsphere.symmetry.result import AuditResult

LEAK_THAT_MATTERS = 0.01
"""Relative change of the output, per e-fold of rescale, above which eps takes part."""

KINDS = {
    Kind.SPHERE: "is scale-invariant, on a sphere of its own",
    Kind.SHARED: "is scale-invariant together with others",
    Kind.TRADED: "is in rescaling symmetries with others, as a whole or part by part",
    Kind.PARTLY: "is scale-dependent in one part, while other parts are not",
    Kind.FIXED: "is scale-dependent: no symmetry of what trains moves its scale",
    Kind.UNKNOWN: (
        "has no symmetry of all of it that could be seen, while some operations were not followed"
    ),
    Kind.TIED: "has a scale that is free only together with frozen weights or buffers",
    Kind.INERT: "has no effect on the output",
    Kind.FROZEN: "is frozen",
    Kind.UNREACHED: "not reached by this input",
}

_WEIGHT = {
    Kind.SPHERE: "train it on its sphere ({granularity}), without weight decay",
    Kind.SHARED: "decay it at the rate of the weights it shares its scale with, or not at all",
    Kind.TRADED: "decay it like the others of its rescaling symmetry, so that they stay balanced",
    Kind.PARTLY: "decay it only if a smaller scale of that part is wanted",
    Kind.FIXED: "decay it only if a smaller scale is wanted",
    Kind.UNKNOWN: "decay it as you would without this audit",
    Kind.TIED: "decay it only if a smaller scale is wanted",
    Kind.INERT: "remove or freeze it",
    Kind.FROZEN: "nothing, as long as it is frozen",
    Kind.UNREACHED: "audit on inputs that reach it",
}


_MAXIMAL = (
    "audit.param_groups(model, fix='maximal') holds the norms of a largest set of weights, which "
    "loses no function; audit.fixed_scales(model) says of which."
)


def of_weight(audit: AuditResult, name: str) -> str:
    """Say what to do with one weight."""
    kind = audit.kinds[name]
    sphere = audit.own_spheres().get(name)
    words = _WEIGHT[kind].format(granularity=sphere.granularity if sphere else "")
    vector = len([s for s in audit.parameters[name] if s > 1]) < 2
    if kind in (Kind.PARTLY, Kind.FIXED, Kind.TIED, Kind.UNKNOWN) and vector:
        return "leave it without weight decay, as gains and biases usually are"
    return words


def of_model(audit: AuditResult) -> list[str]:
    """Say what to do with a model, most useful first."""
    return [
        *on_mode(audit),
        *_on_spheres(audit), *_on_shared(audit), *_on_traded(audit), *_on_tied(audit),
        *_on_inert(audit),
        *_on_inert_parts(audit), *_on_detached(audit), *_on_leaks(audit), *limits(audit),
    ]  # fmt: skip


def large_leaks(audit: AuditResult) -> list[Leak]:
    """Return the symmetries that eps breaks by more than one per cent per e-fold."""
    return [x for x in audit.leaks if x.amount > LEAK_THAT_MATTERS]


def _of(audit: AuditResult, kind: Kind) -> list[str]:
    return [n for n, k in audit.kinds.items() if k is kind]


def _on_spheres(audit: AuditResult) -> list[str]:
    count = len(_of(audit, Kind.SPHERE))
    if not count and _nothing_shown(audit):
        return []
    if not count:
        own = " that trains" if audit.own_spheres() else ""
        nothing = (
            f"No weight{own} is scale-invariant on its own, so none goes on a sphere by default."
        )
        return [f"{nothing} {_MAXIMAL}" if _something_trades(audit) else nothing]
    return [
        f"{_weights_are(count)} scale-invariant: pass audit.param_groups(model) to a sphere "
        "optimizer, as onsphere.optim.SphereAdamW (embeddings and heads stay off spheres without "
        "embeddings=True). With an ordinary optimizer, weight decay on them is a schedule of "
        "their learning rate."
    ]


def without_spheres(audit: AuditResult, skipped: Iterable[str] = ()) -> str:
    """Say why no weight goes to a sphere of its own, what was found instead, and what can be done.

    Args:
        audit: of a model without spheres, or with some that were left out.
        skipped: embeddings and heads, which are left out unless asked for.
    """
    left_out = sorted({*audit.own_spheres()} & {*skipped})
    if left_out:
        return (
            f"of {audit.model} only embeddings or heads are on spheres of their own "
            f"({', '.join(folded(left_out)[:3])}), and these are left out: say embeddings=True"
        )
    shared, trading = len(_of(audit, Kind.SHARED)), len(_of(audit, Kind.TRADED))
    tied = len(_of(audit, Kind.TIED))
    found = [
        *([f"{_weights_are(shared)} on joint spheres (scaled all at once, and only together, they "
           "change nothing)"] if shared else []),
        *([f"{_weights_are(trading)} in rescaling symmetries"] if trading else []),
        *([f"{_weights_are(tied)} tied to frozen weights or buffers"] if tied else []),
    ]  # fmt: skip
    instead = f"; {' and '.join(found)}" if found else ", and no scale of it is free at all"
    maximal = (
        ". audit.param_groups(model, fix='maximal') holds the norms of a largest set of weights, "
        "which loses no function"
    )
    return (
        f"no weight of {audit.model} is on a sphere of its own in {audit.mode} mode{instead}. "
        "So no group gets a sphere, and an optimizer on spheres is its "
        "base optimizer here; a Monitor watches all matrices instead"
        + (maximal if _something_trades(audit) else "")
    )


def _something_trades(audit: AuditResult) -> bool:
    """Return whether the scale of a weight, or of a part of it, is free together with others."""
    return bool(_of(audit, Kind.SHARED) or _of(audit, Kind.TRADED) or audit.free_parts)


def _nothing_shown(audit: AuditResult) -> bool:
    return any(limit.kind == "float64" for limit in audit.limits)


def _on_shared(audit: AuditResult) -> list[str]:
    names = _of(audit, Kind.SHARED)
    if not names:
        return []
    if audit.shrink_alike(names):
        return [
            f"{_weights(len(names))} can shrink together without effect: give all of them the same "
            "weight decay, or none; what it sets is their learning rate."
        ]
    return [
        f"{_weights(len(names))} can shrink together without effect, but not all by one factor. "
        "Those of one joint sphere can: the same weight decay on these sets their learning rate. "
        "Equal weight decay on all also shrinks some against others, which is a penalty."
    ]


def _on_traded(audit: AuditResult) -> list[str]:
    count = len(_of(audit, Kind.TRADED))
    if not count:
        return []
    return [
        f"{_weights_are(count)} in rescaling symmetries: weight decay penalizes their products and "
        "balances them; onsphere.canonicalize(model, audit) balances them at once, with the same "
        "function."
    ]


def _on_tied(audit: AuditResult) -> list[str]:
    names = _of(audit, Kind.TIED)
    if not names:
        return []
    moved = [*audit.scale_symmetries, *({*f.names} for f in audit.families)]
    beside = {n for together in moved if not {*names}.isdisjoint(together) for n in together}
    still = sorted(n for n in beside if n not in audit.parameters or n in audit.frozen)
    others = folded([n for n in audit.tied_to if n in beside] or still)
    shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    return [
        f"{_weights(len(names))} can change scale without effect only together with frozen weights "
        f"or buffers ({shown}): weight decay penalizes the scale."
    ]


def _on_inert(audit: AuditResult) -> list[str]:
    if not audit.inert:
        return []
    names = folded(audit.inert)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{_weights(len(audit.inert))} cannot affect the output and can be removed: {shown}."]


def _on_inert_parts(audit: AuditResult) -> list[str]:
    """Say of parts without effect what they are: of a fused qkv mostly the bias of the keys."""
    found = {
        part.name: ", ".join(f"[{start}:{stop}]" for start, stop in part.intervals[:3])
        for part in audit.parts
        if part.kind == "inert"
    }
    if not found:
        return []
    names = folded(list(found))
    first = next(iter(found))
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [
        f"A part of {_weights(len(found))} cannot affect the output ({shown}; of {first} the "
        f"entries {found[first]}), as the keys' part of a fused bias, which softmax removes again: "
        "nothing is lost without weight decay on these weights, which audit.param_groups leaves "
        "out as it does all biases; their norms say nothing."
    ]


def _on_detached(audit: AuditResult) -> list[str]:
    spheres = [s for s in audit.spheres if not s.tangent]
    claims: list[ScaleInvariance | Rescaling] = [
        *spheres,
        *(r for r in audit.rescalings if not r.tangent),
    ]
    if not claims:
        return []
    names = folded(sorted({n for c in claims for n in c.names if n in audit.parameters}))
    count = "1 symmetry is" if len(claims) == 1 else f"{len(claims)} symmetries are"
    return [
        f"{count} of the function, but not of its gradient, which does not know of a scale that "
        f"the model detaches or reads as a number ({', '.join(names[:3])}): gradients move the "
        "norms of these weights as well. A sphere optimizer takes that part out."
    ]


def _on_leaks(audit: AuditResult) -> list[str]:
    large = large_leaks(audit)
    if not large:
        return []
    worst = max(large, key=lambda x: x.amount)
    return [
        f"eps, the small constant in normalizations, takes part in {len(large)} of "
        f"{len(audit.leaks)} symmetries: around them activations are so small that scaling by "
        f"e = 2.718 changes the output by up to {worst.amount:.0%} "
        f"({next(iter(worst.exponents))}). Larger activations or a smaller eps mend this."
    ]


def on_mode(audit: AuditResult) -> list[str]:
    """Say of an audit in evaluation mode what training does otherwise, if it does."""
    buffers = {n for v in audit.scale_symmetries for n in v if n not in audit.parameters}
    if audit.mode == "train" or not buffers:
        return []
    return [
        "In evaluation mode running statistics are numbers like weights that training leaves as "
        "they are. Audit the model in training mode for what weight decay does there."
    ]


def limits(audit: AuditResult) -> list[str]:
    """Say what a reader must know before relying on an audit."""
    said = [limit.words for limit in audit.limits]
    if audit.unknown_ops:
        ops = sorted({u.name for u in audit.unknown_ops})
        said.append(
            f"Operations without a rule, through which nothing is claimed: {', '.join(ops)}. "
            "onsphere.symmetry.register_rule adds one."
        )
    if not audit.certified:
        said.append(
            "The model is on the meta device, without values: its symmetries are "
            f"{exactness(audit)}, but not certified on numbers, and of inert weights and shifts "
            "only those that the operations show are listed. The audit of a small copy with "
            "memory lists all (on the command line, of a config: --shrink)."
        )
    elif not audit.complete and not audit.limits:
        said.append(
            "The model is large: a search by numbers for symmetries that its operations alone do "
            "not show was left out or cut short. audit(..., search_seconds=...) gives it more time "
            "(on the command line: --search-seconds)."
        )
    return said


def exactness(audit: AuditResult) -> str:
    """Say how far to rely on what operations alone show."""
    ops = audit.taught_ops
    if not ops:
        return "exact"
    shown = ", ".join(ops[:3]) + (f" and {len(ops) - 3} more" if len(ops) > 3 else "")
    rules, are = ("rule", "is") if len(ops) == 1 else ("rules", "are")
    return f"exact if the {rules} of {shown} {are}"


def _weights_are(count: int) -> str:
    return f"{_weights(count)} {'is' if count == 1 else 'are'}"


def _weights(count: int) -> str:
    return "1 weight" if count == 1 else f"{count} weights"
