"""The audit: every scale symmetry of a model, each with its certificate, in one object."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onsphere import geometry
from onsphere.geometry import VectorAxes
from onsphere.symmetry import table
from onsphere.symmetry.certificate import (
    EPSILON,
    WORST_AMPLIFICATION,
    Certificate,
    Exponents,
    certify,
    is_well_conditioned,
    rounding_floor,
)
from onsphere.symmetry.claims import Leak, Rescaling, Sphere, WeightReport
from onsphere.symmetry.evidence import Evidence, gather
from onsphere.symmetry.gathered import on_gathered
from onsphere.symmetry.granularity import described, finest_divisions
from onsphere.symmetry.inert import are_inert, inert_candidates
from onsphere.symmetry.missed import completed
from onsphere.symmetry.parts import Part, find_parts
from onsphere.symmetry.probe import Point, Probe
from onsphere.symmetry.shift import Shift, ShiftSearch
from onsphere.symmetry.trace import (
    ModelError,
    OutputPicker,
    Trace,
    UnknownOp,
    bare_name,
    plain_execution,
    trace,
    unwrapped,
    weights,
)
from onsphere.symmetry.units import in_span

COTANGENTS = 3
"""Random combinations of the outputs per point."""


@dataclass(frozen=True)
class Inputs:
    """What a model was run on.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors to keep fixed.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: OutputPicker | None


@dataclass(frozen=True)
class Audit:
    """Which weights of a model live on spheres, and what else can change without effect.

    Args:
        model: name of the model's class.
        mode: ``"train"`` or ``"eval"``: the mode it was audited in.
        parameters: every parameter's name and shape, in the order of the model.
        spheres: weights, or sets of weights, whose scale does nothing, inert ones left out.
        rescalings: weights whose scales trade off against each other.
        shifts: directions in which a weight can move.
        inert: parameters that cannot affect the output.
        leaks: how far the real eps breaks each symmetry.
        scale_symmetries: a basis of all scale symmetries: name -> exponent.
        exact_symmetries: a basis of those that the real eps does not break either.
        followers: buffers that only estimate (running statistics in training mode), and how they
            should move along; one entry per scale symmetry.
        unknown_ops: operations that the analysis did not understand and never claims through.
        parts: intervals of weights that are on spheres, or inert, while the whole weight is not.
        unreached: parameters that this input did not reach (an expert nobody asked); no claim.
        certified: whether the claims were tested on numbers; not so for a model without memory.
        complete: whether the numeric search for further symmetries ran to its end.
        inputs: what the model was run on; not written to a file.
    """

    model: str
    mode: str
    parameters: Mapping[str, tuple[int, ...]]
    spheres: list[Sphere]
    rescalings: list[Rescaling]
    shifts: list[Shift]
    inert: list[str]
    leaks: list[Leak]
    scale_symmetries: list[dict[str, Fraction]]
    exact_symmetries: list[dict[str, Fraction]]
    followers: list[dict[str, Fraction]]
    unknown_ops: list[UnknownOp]
    unreached: list[str]
    certified: bool
    complete: bool
    parts: list[Part] = field(default_factory=list)
    inputs: Inputs | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return table.rendered(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return _plain(asdict(replace(self, inputs=None)))

    def to_json(self, path: str | Path) -> None:
        """Write the audit to a file that :meth:`from_json` reads back."""
        text = json.dumps(self.to_dict(), indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "Audit":
        """Read an audit that :meth:`to_json` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(data)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold an audit: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Audit":
        """Undo :meth:`to_dict`."""
        fields = dict(data)
        fields["parameters"] = {n: tuple(s) for n, s in data["parameters"].items()}
        fields["spheres"] = [
            Sphere(**{**s, "exponents": _fractions(s["exponents"]), "axes": _axes(s["axes"])})
            for s in data["spheres"]
        ]
        fields["rescalings"] = [
            Rescaling(**{**r, "exponents": _fractions(r["exponents"])}) for r in data["rescalings"]
        ]
        fields["shifts"] = [Shift(**{**s, "axes": _axes(s["axes"])}) for s in data["shifts"]]
        fields["leaks"] = [
            Leak(**{**x, "exponents": _fractions(x["exponents"])}) for x in data["leaks"]
        ]
        for key in ("scale_symmetries", "exact_symmetries", "followers"):
            fields[key] = [_fractions(v) for v in data[key]]
        fields["parts"] = [
            Part(**{**p, "intervals": tuple((a, b) for a, b in p["intervals"])})
            for p in data.get("parts", [])
        ]
        fields["unknown_ops"] = [UnknownOp(**u) for u in data["unknown_ops"]]
        return cls(**fields)

    def own_spheres(self) -> dict[str, Sphere]:
        """Return the weights that live on a sphere without any other parameter."""
        alone = {}
        for sphere in self.spheres:
            names = [n for n in sphere.names if n in self.parameters]
            if len(names) == 1 and len(sphere.names) == 1:
                alone[names[0]] = sphere
        return alone

    def spheres_of(
        self, model: nn.Module, *, embeddings: bool = False
    ) -> dict[nn.Parameter, geometry.Sphere]:
        """Return the parameters on spheres of their own, as an optimizer takes them.

        Args:
            model: the audited model, or one with the same parameters.
            embeddings: put embedding tables and the head on spheres too, where they are.

        Returns:
            Parameter -> the product of spheres it lives on; radii are the present norms.

        Raises:
            ValueError: the model lacks a parameter of this audit.
        """
        owned = self._parameters_of(model)
        skipped = set() if embeddings else _embeddings_and_heads(model)
        return {
            owned[n]: geometry.Sphere(s.axes)
            for n, s in self.own_spheres().items()
            if n not in skipped
        }

    def param_groups(
        self, model: nn.Module, *, weight_decay: float = 0.0, embeddings: bool = False
    ) -> list[dict[str, Any]]:
        """Return groups ready for an optimizer: spheres, the rest with and without decay.

        Args:
            model: the audited model, or one with the same parameters.
            weight_decay: decay of matrices that are not on spheres; vectors (gains, biases) and
                weights on spheres get none.
            embeddings: put embedding tables and the head on spheres too, where they are.

        Returns:
            One group per kind of sphere with ``"sphere"`` set, then at most two without; every
            trainable parameter is in exactly one.

        Raises:
            ValueError: the model lacks a parameter of this audit.
        """
        spheres = self.spheres_of(model, embeddings=embeddings)
        groups: dict[Any, dict[str, Any]] = {}
        for name, p in self._parameters_of(model).items():
            if not p.requires_grad:
                continue
            sphere = spheres.get(p)
            decay = weight_decay if sphere is None and p.ndim > 1 else 0.0
            group = groups.setdefault(
                (sphere, decay),
                {"params": [], "names": [], "sphere": sphere, "weight_decay": decay},
            )
            group["params"].append(p)
            group["names"].append(name)
        return sorted(groups.values(), key=lambda g: (g["sphere"] is None, -g["weight_decay"]))

    def weight_reports(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> list[WeightReport]:
        """Say for each weight how large it is, how fast it turns and what weight decay does.

        Args:
            model: the audited model; its ``.grad`` are read where they are.
            optimizer: where the learning rates come from.

        Returns:
            One report per parameter.
        """
        rates = {} if optimizer is None else {
            p: float(g["lr"]) for g in optimizer.param_groups for p in g["params"]
        }  # fmt: skip
        on_spheres = self.own_spheres()
        return [
            _weight_report(n, p, rates.get(p), n in on_spheres, self.decay_of(n))
            for n, p in self._parameters_of(model).items()
        ]

    def decay_of(self, name: str) -> str:
        """Say what weight decay does to a weight: a rate schedule, a real penalty, or nothing."""
        if name in self.inert:
            return "nothing: the weight has no effect"
        if name in self.own_spheres():
            return "a rate schedule: it sets the effective learning rate, not the function"
        if any(name in s.names for s in self.spheres):
            return "a rate schedule for the weights that share this scale"
        if any(name in r.names for r in self.rescalings):
            return "a penalty on the product of traded weights, and a pull towards balance"
        return "a real penalty"

    def _parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found = {bare_name(n): p for n, p in unwrapped(model).named_parameters()}
        missing = [n for n in self.parameters if n not in found]
        if missing:
            raise ValueError(
                f"the model has no parameter {missing[0]!r} ({len(missing)} of "
                f"{len(self.parameters)} are missing); audit this model again"
            )
        return found


@on_gathered
def audit(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: OutputPicker | None = None,
    seed: int = 0,
) -> Audit:
    r"""Find every scale symmetry of a model, exactly, and certify each on numbers.

    A symmetry :math:`\{p_i: e_i\}` means :math:`f(a^{e_1}p_1, a^{e_2}p_2, \dots) = f(p)` for all
    :math:`a > 0`. Units of the executed operations give them over the rationals; float64
    evaluations certify them, find what cannot affect the output, and how finely spheres divide.

    Args:
        model: any module; audited in the mode it is in, and left as it was.
        args: positional inputs as ``torch.export`` takes them: a tuple, or one tensor.
        kwargs: keyword inputs.
        output: picks from the result the tensors that must not change; all float tensors without.
        seed: seed of the random cotangents, weights and inputs of the certificates.

    Returns:
        The audit. A model on the meta device is analysed without certificates.

    Raises:
        ModelError: no parameters, NaN in a parameter, an error in ``forward``, no float output.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = audit(net, (torch.randn(8, 3, generator=torch.Generator().manual_seed(0)),))
        >>> [(s.names, s.granularity) for s in found.spheres]
        [(('0.weight',), 'per row')]
        >>> found.inert
        ['0.bias']
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    inner = unwrapped(model)
    _check_numbers(inner)
    with plain_execution():
        traced = trace(inner, args, kwargs, output=output)
        if any(p.is_meta for p in inner.parameters()):
            found = _concluded(inner, traced, _Findings([dict(v) for v in traced.basis]))
        else:
            probe = Probe(inner, args, kwargs, traced, output=output, seed=seed)
            found = _concluded(inner, *_investigated(probe, args, kwargs))
    return replace(found, inputs=Inputs(args, kwargs, output))


@dataclass(frozen=True)
class _Findings:
    """What the numbers add to the claims of the units."""

    claims: list[dict[str, Fraction]]
    certificates: list[Certificate] | None = None
    inert: list[str] = field(default_factory=list)
    divisions: Mapping[int, VectorAxes] = field(default_factory=dict)
    shifts: list[Shift] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    complete: bool = False


def _investigated(
    probe: Probe, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Trace, _Findings]:
    """Certify what the units claim, and find what only numbers can tell."""
    traced = probe.traced
    random = _random_points(probe, 2)
    given = [probe.given()] if is_well_conditioned(probe, probe.given()) else []
    shifts = ShiftSearch(
        {n: probe.given().state[probe.own_name[n]].shape for n in traced.parameters}
    )
    evidence = gather(probe, [*random, *given], COTANGENTS, shifts.see)
    inert = _inert(probe, evidence, random, given)
    if inert:
        traced = trace(probe.model, args, kwargs, output=probe.output, inert=inert)
        probe.traced = traced
    claims = [dict(v) for v in traced.basis if not _touches(v, _unreached(traced))]
    claims, complete = completed(
        probe, claims, evidence, lambda n: _random_points(probe, 1, turn=n)[0]
    )
    certificates = certify(probe, claims, [*random, *given], evidence)
    held = [(v, c) for v, c in zip(claims, certificates, strict=True) if c.holds]
    claims = [v for v, _ in held]
    alone = {next(iter(v)) for v in claims if len(v) == 1}
    alive = [n for n in traced.parameters if n not in inert]
    return traced, _Findings(
        claims,
        [c for _, c in held],
        inert,
        _divisions(probe, claims, inert, random, evidence),
        shifts.certified(probe, alive, random),
        find_parts(probe, [n for n in alive if n not in alone], random, evidence),
        complete,
    )


def _check_numbers(model: nn.Module) -> None:
    broken = [
        bare_name(n) for n, p in model.named_parameters()
        if not p.is_meta and not bool(torch.isfinite(p.detach()).all())
    ]  # fmt: skip
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ModelError(f"parameter {broken[0]!r}{more} holds NaN or infinity")


def _random_points(probe: Probe, count: int, turn: int = 0) -> list[Point]:
    """Draw random weights at which the model is well conditioned."""
    points: list[Point] = []
    spare: list[tuple[float, Point]] = []
    noise = 0.4
    for attempt in range(10 * count):
        point = probe.redrawn(noise, size=1.0 if (attempt + turn) % 2 == 0 else 0.4)
        floor = rounding_floor(probe, point)
        if floor < WORST_AMPLIFICATION * EPSILON:
            points.append(point)
        else:
            spare = sorted([*spare, (floor, point)], key=lambda pair: pair[0])[:count]
            noise /= 2 if attempt % 3 == 2 else 1
        if len(points) == count:
            return points
    points += [p for floor, p in spare if floor < 1][: count - len(points)]
    if points:
        return points
    raise ModelError(
        "no weights near the model's own give numbers that can be compared: the output is not "
        "finite, or a normalization divides by rounding errors"
    )


def _unreached(traced: Trace) -> set[str]:
    return set(traced.unread) if traced.data_dependent else set()


def _touches(v: Exponents, names: set[str]) -> bool:
    return any(n in names for n in v)


def _inert(
    probe: Probe, evidence: Evidence, random: Sequence[Point], given: Sequence[Point]
) -> list[str]:
    # At an ill-conditioned point rounding can hide a zero, so one point is enough to be tested.
    rows = [evidence.radial(i) for i in range(len(random))]
    silent = {n for r in rows for n in inert_candidates(r)} - _unreached(probe.traced)
    return are_inert(probe, [n for n in probe.names if n in silent], [*random, *given])


def _divisions(
    probe: Probe,
    claims: Sequence[Exponents],
    inert: Sequence[str],
    points: Sequence[Point],
    evidence: Evidence,
) -> dict[int, VectorAxes]:
    wanted = [
        i
        for i, v in enumerate(claims)
        if all(e > 0 for e in v.values())
        and not _touches(v, set(inert))
        and set(v) <= set(probe.names)
    ]
    if not wanted:
        return {}
    spheres = [{n: float(e) for n, e in claims[i].items()} for i in wanted]
    return dict(zip(wanted, finest_divisions(probe, spheres, points, evidence), strict=True))


def _concluded(model: nn.Module, traced: Trace, findings: _Findings) -> Audit:
    claims, certificates = findings.claims, findings.certificates
    inert, divisions = findings.inert, findings.divisions
    parameters, buffers = weights(model)
    shapes = {bare_name(n): tuple(t.shape) for n, t in {**parameters, **buffers}.items()}
    spheres, rescalings, leaks = [], [], []
    for i, v in enumerate(claims):
        numbers: dict[str, float] = {}
        if certificates is not None:
            numbers = {"residual": certificates[i].residual, "change": certificates[i].change}
            leaks.append(Leak(dict(v), certificates[i].leak))
        if len(v) == 1 and next(iter(v)) in inert:
            continue
        if all(e > 0 for e in v.values()):
            axes = divisions.get(i, VectorAxes())
            first = next(iter(v))
            words = described(axes, shapes[first], traced.roles.get(first, frozenset()))
            spheres.append(Sphere(dict(v), axes, words, **numbers))
        else:
            rescalings.append(Rescaling(dict(v), **numbers))
    follow = {_key(v): dict(f) for v, f in zip(traced.basis, traced.followers, strict=True)}
    return Audit(
        model=type(model).__name__,
        mode="train" if model.training else "eval",
        parameters={n: shapes[n] for n in traced.parameters},
        spheres=spheres,
        rescalings=rescalings,
        shifts=findings.shifts,
        inert=[n for n in inert if n in traced.parameters],
        parts=findings.parts,
        leaks=leaks,
        scale_symmetries=[dict(v) for v in claims],
        exact_symmetries=_spanned(traced.exact, claims),
        followers=[follow.get(_key(v), {}) for v in claims],
        unknown_ops=list(traced.unknown),
        unreached=sorted(_unreached(traced)),
        certified=certificates is not None,
        complete=findings.complete,
    )


def _spanned(exact: Sequence[Exponents], claims: Sequence[Exponents]) -> list[dict[str, Fraction]]:
    """Keep the exact symmetries that follow from claims which passed their certificates."""
    index = {n: i for i, n in enumerate({n for v in [*exact, *claims] for n in v})}
    basis = [{index[n]: e for n, e in v.items()} for v in claims]
    return [dict(v) for v in exact if in_span({index[n]: e for n, e in v.items()}, basis)]


def _key(v: Exponents) -> tuple[tuple[str, Fraction], ...]:
    return tuple(sorted(v.items()))


def _weight_report(
    name: str, p: Tensor, rate: float | None, on_sphere: bool, decay: str
) -> WeightReport:
    norm = float(
        torch.linalg.vector_norm(p.detach(), dtype=torch.promote_types(p.dtype, torch.float32))
    )
    effective = angle = None
    if on_sphere and rate is not None and norm > 0:
        effective = rate / norm**2
        if p.grad is not None:
            g = p.grad.detach()
            angle = math.atan2(rate * float(torch.linalg.vector_norm(g)), norm)
    return WeightReport(name, norm, effective, angle, decay)


def _embeddings_and_heads(model: nn.Module) -> set[str]:
    """Return the weights of embedding tables, and of the module a model calls its output layer."""
    inner = unwrapped(model)
    names = {bare_name(n): p for n, p in inner.named_parameters()}
    tables = {p for m in inner.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    get_head = getattr(inner, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if isinstance(head, nn.Module):
        tables |= set(head.parameters())
    return {n for n, p in names.items() if p in tables}


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _fractions(value: Mapping[str, str]) -> dict[str, Fraction]:
    return {k: Fraction(v) for k, v in value.items()}


def _axes(value: Mapping[str, Any]) -> VectorAxes:
    return VectorAxes(tuple(value["index"]), tuple((a, n) for a, n in value["pieces"]))
