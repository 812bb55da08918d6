r"""Norms folded into the linear maps around them: the same function with fewer operations.

Folding is choosing a representative among the weights that the symmetries of a model carry into
each other: the one with gains of 1, shifts of 0 and statistics that do nothing. So families of
symmetries say what may go where, for any architecture, and numbers say whether it is right.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from onsphere._torch.execution import (
    ModelError,
    OutputPicker,
    inputs_of,
)
from onsphere._torch.materialize import unwrapped
from onsphere.errors import OnsphereError, nearest
from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.exact.writes import writes_taken_back
from onsphere.symmetry.numeric.certificate import relative_change
from onsphere.symmetry.numeric.probe import cloned
from onsphere.symmetry.rewrite.folding.certificate import Certificate, Fold
from onsphere.symmetry.rewrite.folding.kinds.batch_norms import batch_norms, propose_batch_norm
from onsphere.symmetry.rewrite.folding.kinds.centering import (
    as_rms_norm,
    can_be_rms_norm,
    propose_centering,
)
from onsphere.symmetry.rewrite.folding.kinds.forward_weights import ForwardWeight, forward_weights
from onsphere.symmetry.rewrite.folding.kinds.gains import gains, is_norm, propose_gain
from onsphere.symmetry.rewrite.folding.kinds.offsets import (
    GAIN,
    SHIFT,
    offset_norms,
    with_gains_outside,
)
from onsphere.symmetry.rewrite.folding.kinds.parametrizations import (
    Computed,
    computed_weights,
    in_float64,
    make_plain,
)
from onsphere.symmetry.rewrite.folding.linear_maps import LinearMap, linear_maps
from onsphere.symmetry.rewrite.folding.reasons import Neighbours
from onsphere.symmetry.rewrite.folding.report import Folded, FoldedPart, FoldReport, KeptPart
from onsphere.symmetry.rewrite.folding.surgery import add_bias, is_plain_norm, put, write
from onsphere.symmetry.rewrite.folding.targets import Known, State, listed
from onsphere.symmetry.rewrite.ranges import compared
from onsphere.symmetry.rewrite.reach import may_meet, not_reached, unreached
from onsphere.symmetry.rewrite.verification import (
    allowed_change,
    checked_tolerance,
    copied,
    kept_buffers,
    outputs_as_it_computes,
    outputs_in_float64,
    refuse_moved,
    refuse_nothing_to_compare,
    refuse_shared_memory,
    refuse_without_values,
    wide_state,
)

What = Literal["all", "batchnorm", "gain", "scale", "centering", "weight"]
KINDS = ("batchnorm", "gain", "scale", "centering", "weight")
"""BatchNorm into writers; gains and shifts into readers; layer scale; LayerNorm's centring into
writers; computed weights."""


_CLASS_COMPUTES = "its class computes it, and would not load a plain weight"


class FoldError(OnsphereError, ValueError):
    """A model cannot be folded as given; the message says why."""


def fold(
    model: nn.Module,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    what: What | Collection[str] = "all",
    inplace: bool = False,
    output: OutputPicker | None = None,
    tolerance: float | None = None,
    keep_modules: bool | None = None,
) -> Folded:
    r"""Move norms into the linear maps around them; verified on inputs before it returns.

    A norm with running statistics is an affine map in evaluation mode. With
    :math:`s = g/\sqrt{v+\epsilon}`, its gain and statistics go into the linear map that writes its
    input, channel by channel:

    .. math:: W' = \mathrm{diag}(s)\,W, \qquad b' = s\,(b - m) + \beta.

    A gain :math:`g` and a shift :math:`\beta` of LayerNorm, RMSNorm or GroupNorm (stored as
    :math:`g` or as :math:`g - 1`) go into the linear maps that read them,

    .. math:: W' = W\,\mathrm{diag}(g), \qquad b' = b + W\beta,

    and a scale behind a map (layer scale) goes into that map. Where everything that reads a sum
    takes the mean away first, the maps that write it are centred,

    .. math:: W' = (I - \mathbf 1 \mathbf 1^\top / n)\, W, \qquad b' = b - \bar b,

    and LayerNorm becomes RMSNorm. Weights that are computed from others (weight norm, spectral
    norm, weight standardization, any parametrization) become plain.

    Which maps these are is read off the families of scale symmetries of the model, so there is no
    list of architectures: convolutions in 1 to 3 dimensions, plain, transposed, grouped and
    depthwise, and linear maps, through views, slices and concatenations. Every fold is tried in
    float64 at the model's own weights and at random ones, on the given inputs and on others, and
    is undone where the output moves by more than rounding.

    A map that has no bias gets one where it needs it, and what became the identity is replaced.
    Models of a library with ``save_pretrained`` keep their modules, names and classes, so that
    saving and loading works (``keep_modules``): there a folded norm stays, as the identity, and a
    shift stays in it where a map has no bias.

    Args:
        model: any module, in evaluation mode if it holds norms with running statistics. Compiled
            and data-parallel ones come back without their wrapper.
        args: inputs to verify on, as :func:`audit` takes them.
        kwargs: keyword inputs.
        what: ``"all"``, or one or several of ``"batchnorm"``, ``"gain"`` (of norms), ``"scale"``
            (of layers), ``"centering"`` (of LayerNorm) and ``"weight"`` (computed ones: of
            weight norm, spectral norm, and pruned ones, whose mask goes into them).
        inplace: change ``model`` itself instead of a copy; it is left as it was on any error.
        output: picks the tensors that must not change; all float tensors without.
        tolerance: largest relative change of the output to accept, as the model computes; rounding
            without: 1e-12 in float64, 1e-5 in float32, and four times the distance of the
            model's own output from that in float64, where that is more.
        keep_modules: change values only, so that the weights load into the same class; without,
            where the model has ``save_pretrained``.

    Returns:
        The model, and a report: what was folded, what was not and why, how far the output moved.

    Raises:
        FoldError: norms with running statistics in training mode, no inputs, no weights or NaN in
            them, an output that would move further than the tolerance.

    References:
        Jacob et al., *Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference*, CVPR 2018, section 3.2 (folding BatchNorm); Nagel et
        al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, ICCV 2019.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> folded = fold(net, torch.randn(1, 3, 8, 8))
        >>> folded.model[1], [(p.name, p.into) for p in folded.report.folded]
        (Identity(), [('1', ('0',))])
    """
    source = unwrapped(model)
    kinds = _kinds(what)
    checked_tolerance(tolerance, FoldError)
    if args is None and not kwargs:
        raise FoldError("give inputs (args or kwargs): every fold is verified on them")
    try:
        args, kwargs = inputs_of(source, args, kwargs)
        _check(source, kinds)
        if inplace:
            refuse_shared_memory(source, FoldError)
        plan, report = _Folding(
            source, args, kwargs, kinds, output, tolerance,
            keeps_classes(source) if keep_modules is None else keep_modules,
        ).done()  # fmt: skip
    except ModelError as error:
        raise FoldError(str(error)) from error
    if not inplace:
        return Folded(plan.model, report)
    plan.installed(source)
    return Folded(source, report)


def _kinds(what: What | Collection[str]) -> frozenset[str]:
    asked = {what} if isinstance(what, str) else set(what)
    unknown = sorted(str(k) for k in asked - {*KINDS, "all"})
    if unknown or not asked:
        wrong = unknown[0] if unknown else ""
        raise FoldError(f"`what` cannot be {wrong!r}{nearest(wrong, ['all', *KINDS])}")
    return frozenset(KINDS if "all" in asked else asked)


def _check(model: nn.Module, kinds: Collection[str]) -> None:
    refuse_without_values(model, FoldError, "fold")
    training = [p for p, m in batch_norms(model).items() if m.training]
    if training and "batchnorm" in kinds:
        raise FoldError(
            f"{training[0]!r} is in training mode, where it normalizes by its batch and cannot be "
            "folded; call model.eval() first"
        )


def keeps_classes(model: nn.Module) -> bool:
    """Return whether a library writes and loads a model by its class and configuration."""
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a model becomes.

    Args:
        model: a copy, already changed.
        plain: weights that are no longer computed.
        rebuilt: the same, of modules that computed them in ``forward``.
        state: weights and buffers that change, by name, in float64.
        fresh: maps that get a bias.
        removed: paths of modules that are replaced by the identity.
        centered: paths of modules that are replaced by RMSNorm.
    """

    model: nn.Module
    plain: Sequence[Computed]
    rebuilt: Sequence[ForwardWeight]
    state: State
    fresh: Sequence[LinearMap]
    removed: Sequence[str]
    centered: Sequence[str]

    def installed(self, model: nn.Module) -> None:
        """Do the same to a model."""
        for one in self.plain:
            make_plain(model, one)
        _rebuild(model, self.rebuilt)
        for reader in self.fresh:
            add_bias(model, reader)
        write(model, self.state)
        for path in self.removed:
            put(model, path, nn.Identity())
        _put_rms_norms(model, self.centered)


class _Folding:
    """One run of folding a model.

    Args:
        model: the module; it is not changed.
        args: positional inputs.
        kwargs: keyword inputs.
        kinds: what to fold.
        output: picks the tensors that must not change.
        tolerance: largest relative change of the output in its own type.
        keep_modules: change values only.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        kinds: frozenset[str],
        output: OutputPicker | None,
        tolerance: float | None,
        keep_modules: bool,
    ) -> None:
        self.model, self.args, self.kwargs, self.kinds = model, args, kwargs, kinds
        self.output, self.tolerance = output, tolerance
        self.folded: list[FoldedPart] = []
        self.kept: list[KeptPart] = []
        self.keep_modules = keep_modules
        readers = kinds & {"gain", "scale", "centering"}
        self.unreached = unreached(model, args, kwargs) if readers else {}

    def done(self) -> tuple[_Plan, FoldReport]:
        """Fold a copy, and compare."""
        own = self._outputs(self.model)
        refuse_nothing_to_compare(own, FoldError)
        start = wide_state(self.model)
        before = outputs_in_float64(self.model, start, self.args, self.kwargs, self.output)
        work = copied(self.model, FoldError)
        plain, rebuilt, state = self._plain_weights(work)
        accepted = self._folds(work, state, before)
        fresh = _of_all(f.fresh for f in accepted)
        for f in accepted:
            state |= f.applied(state)
        names = {n for f in accepted for n in _touched(f)} | {one.weight for one in plain}
        names |= {n for one in rebuilt for n in one.values()}
        changed = {n: t for n, t in state.items() if n in names}
        write(work, changed)
        for one in _of_all(f.fresh for f in self._tried):
            if one.path not in {m.path for m in fresh}:
                work.get_submodule(one.path)._parameters["bias"] = None
        removed = self._identities(work, accepted)
        centred, centered = self._centered(work, state)
        changed |= centred
        state |= centred
        write(work, centred)
        removed, centered = self._replaced(work, removed, centered)
        there = {n for n, _ in [*work.named_parameters(), *work.named_buffers()]}
        after = outputs_in_float64(
            work, {n: t for n, t in state.items() if n in there}, self.args, self.kwargs,
            self.output,
        )  # fmt: skip
        exact = relative_change(before, after)
        real = relative_change(own, self._outputs(work))
        report = FoldReport(
            tuple(self.folded), tuple(self.kept), tuple(removed), exact, real, own[0].dtype,
            tuple(
                compared(n, start[n], t)
                for n, t in changed.items()
                if t.ndim > 1 and n in start and start[n].shape == t.shape and t.numel()
            ),
        )  # fmt: skip
        self._compare(report, own, relative_change(before, own))
        return _Plan(work, plain, rebuilt, changed, fresh, removed, centered), report

    def _compare(self, report: FoldReport, own: Sequence[Tensor], rounding: float) -> None:
        allowed = allowed_change(own, rounding, self.tolerance)
        refuse_moved(FoldError, report.change, report.change_in_float64, allowed, self.tolerance)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        return outputs_as_it_computes(model, self.args, self.kwargs, self.output)

    # --- computed weights ---

    def _plain_weights(self, work: nn.Module) -> tuple[list[Computed], list[ForwardWeight], State]:
        done: list[Computed] = []
        values: State = {}
        there = list(computed_weights(work)) if "weight" in self.kinds else []
        for one in there:
            reason = self._why_computed(work, one)
            if reason:
                self.kept.append(KeptPart(one.weight, "weight", reason))
            else:
                values[one.weight] = in_float64(self.model, one)
                done.append(one)
                self.folded.append(FoldedPart(one.weight, "weight", (one.weight,), one.how))
        for one in done:
            make_plain(work, one)
        rebuilt: list[ForwardWeight] = []
        for way in self._computed_in_forward(work):
            reason = _CLASS_COMPUTES if self.keep_modules else way.reason
            if reason:
                self.kept.append(KeptPart(way.weight, "weight", reason))
            else:
                rebuilt.append(way)
                self.folded.append(FoldedPart(way.weight, "weight", (way.weight,), way.how))
                values |= way.values()
        _rebuild(work, rebuilt)
        state = wide_state(work)
        return done, rebuilt, state | {n: t for n, t in values.items() if n in state}

    def _computed_in_forward(self, work: nn.Module) -> list[ForwardWeight]:
        if "weight" not in self.kinds:
            return []
        return forward_weights(work, self.args, self.kwargs, self.output)

    def _why_computed(self, work: nn.Module, one: Computed) -> str:
        if self.keep_modules and one.pruned:
            return f"it is pruned; call torch.nn.utils.prune.remove(module, {one.name!r}) first"
        if self.keep_modules:
            return _CLASS_COMPUTES
        if work.get_submodule(one.path).training:
            beside = [c for c in computed_weights(work) if c.path == one.path]
            if any("pectral" in c.how for c in beside):
                return "spectral norm iterates in training mode; call model.eval() first"
        return ""

    # --- folds along families ---

    def _folds(self, work: nn.Module, state: State, before: Sequence[Tensor]) -> list[Fold]:
        self._tried: list[Fold] = []
        if not self.kinds & {"batchnorm", "gain", "scale"}:
            return []
        proposed, reasons, kinds = self._proposed(work, state)
        self._tried = list(proposed)
        for one in _of_all(f.fresh for f in proposed):
            add_bias(work, one)
            state[one.bias] = state[one.weight].new_zeros(one.outputs)
        accepted: list[Fold] = []
        if proposed:
            certificate = Certificate(
                work, self.args, self.kwargs, self.output, state, proposed, before
            )
            accepted, wrong = certificate.held(proposed)
            less = [a for f in wrong for a in f.alternatives() if self._may(a, state)]
            if less:
                more, _ = certificate.also(accepted, less)
                accepted += more
        for f in accepted:
            self.folded.append(FoldedPart(f.path, f.kind, f.into, f.note))
        done = {f.path for f in accepted}
        for f in proposed:
            if f.path not in done:
                reasons[f.path] = f"tried, and the output moved ({listed(f.into)})"
        self._explain({p: r for p, r in reasons.items() if p not in done}, kinds)
        return accepted

    def _may(self, f: Fold, state: State) -> bool:
        """Return whether a shift may stay behind: divided by the gain, or as it is."""
        gain = state[f.gain] if f.kind != "batchnorm" and f.gain else None
        return gain is None or bool((gain + getattr(f, "offset", 0.0)).all())

    def _proposed(
        self, work: nn.Module, state: State
    ) -> tuple[list[Fold], dict[str, str], dict[str, str]]:
        """Return what families propose, why not the rest, and of what kind each is."""
        offsets = offset_norms(work) if "gain" in self.kinds else []
        seen = with_gains_outside(work, offsets) if offsets else work
        families = channel_symmetries(seen, self.args, dict(self.kwargs), output=self.output)
        inside = {f"{path}.{GAIN}": f"{path}.weight" for path in offsets}
        inside |= {f"{path}.{SHIFT}": f"{path}.bias" for path in offsets}
        families = [
            replace(f, slices=tuple(replace(s, name=inside.get(s.name, s.name)) for s in f.slices))
            for f in families
        ]
        families = [f for f in families if all(s.name in state for s in f.slices)]
        known = Known(
            work, families, linear_maps(work), state, not self.keep_modules,
            {f"{path}.weight": 1.0 for path in offsets},
        )  # fmt: skip
        proposed: list[Fold] = []
        reasons: dict[str, str] = {}
        kinds: dict[str, str] = {}

        def consider(path: str, kind: str, one: Fold | str) -> None:
            if kind in self.kinds:
                kinds.setdefault(path, kind)
                if isinstance(one, str):
                    reasons.setdefault(path, one)
                else:
                    proposed.append(one)

        for path, module in batch_norms(work).items() if "batchnorm" in self.kinds else ():
            consider(path, "batchnorm", propose_batch_norm(known, path, module))
        norms = batch_norms(work)
        for name, path in gains(known).items():
            one = propose_gain(known, name, path)
            if isinstance(one, str) and not is_norm(work, path):
                continue  # some vector, of which nobody knows that it is a scale
            if not isinstance(one, str):
                met = {t.name for t in one.scaled}
                other = may_meet(self.unreached, state[name].numel(), met)
                one = one if other is None else not_reached(other)
            consider(path, "gain" if is_norm(work, path) else "scale", one)
        for path, module in work.named_modules():
            if path and path not in norms and is_norm(work, path) and _has_vector(module):
                consider(path, "gain", "no linear maps alone read it")
        found = {f.path for f in proposed}
        return proposed, {p: r for p, r in reasons.items() if p not in found}, kinds

    def _explain(self, reasons: Mapping[str, str], kinds: Mapping[str, str]) -> None:
        """Say why something stays: what stands beside it, or else what families say."""
        if not reasons:
            return
        try:
            beside: Neighbours | None = Neighbours(self.model, self.args, self.kwargs)
        except ModelError:
            beside = None
        for path, reason in reasons.items():
            found = None
            if beside is not None and kinds[path] == "batchnorm":
                found = beside.why_not_into_writer(path)
            elif beside is not None and kinds[path] == "gain":
                found = beside.why_not_into_readers(path)
            self.kept.append(KeptPart(path, kinds[path], found or reason))

    # --- modules that became the identity ---

    def _identities(self, work: nn.Module, accepted: Iterable[Fold]) -> list[str]:
        if self.keep_modules:
            return []
        return [
            f.path
            for f in accepted
            if f.kind == "batchnorm"
            and not getattr(f, "keeps_shift", False)
            and is_plain_norm(work.get_submodule(f.path))
        ]

    def _replaced(
        self, work: nn.Module, removed: list[str], centered: list[str]
    ) -> tuple[list[str], list[str]]:
        """Replace modules, unless the model then does not run: some read what a norm holds."""
        before = {path: work.get_submodule(path) for path in (*removed, *centered)}
        for path in removed:
            put(work, path, nn.Identity())
        _put_rms_norms(work, centered)
        if not before or self._runs(work):
            return removed, centered
        for path, module in before.items():
            put(work, path, module)
        note = "its class stays: the model reads what it holds"
        self.folded = [
            replace(p, note="; ".join(filter(None, (p.note, note)))) if p.name in before else p
            for p in self.folded
        ]
        return [], []

    def _runs(self, model: nn.Module) -> bool:
        """Return whether a model runs as users run it: PyTorch has other ways without gradients."""
        try:
            own = writes_taken_back(model.parameters())
            with torch.no_grad(), kept_buffers(model), torch.random.fork_rng(devices=[]), own:
                model(*tree_map(cloned, tuple(self.args)), **tree_map(cloned, dict(self.kwargs)))
        except (AttributeError, TypeError):
            return False
        return True

    # --- LayerNorm's centring ---

    def _centered(self, work: nn.Module, state: State) -> tuple[State, list[str]]:
        """Return what changes when writers are centred, and which norms become RMSNorm."""
        if "centering" not in self.kinds:
            return {}, []
        found = propose_centering(work, self.args, self.kwargs, self.output, self.unreached)
        into = tuple(dict.fromkeys(c.name for c in found.centers))
        replaced = []
        for path in found.norms:
            note = ""
            if self.keep_modules:
                note = "its class stays, and centres nothing any more"
            elif not can_be_rms_norm(work.get_submodule(path)):
                note = "its class stays, which has a shift or does more"
            else:
                replaced.append(path)
            self.folded.append(FoldedPart(path, "centering", into, note))
        self.kept += [KeptPart(path, "centering", why) for path, why in found.others]
        return found.applied(state), replaced


def _rebuild(model: nn.Module, some: Iterable[ForwardWeight]) -> None:
    for one in some:
        put(model, one.path, one.module_like(model.get_submodule(one.path)))


def _put_rms_norms(model: nn.Module, paths: Iterable[str]) -> None:
    for path in paths:
        put(model, path, as_rms_norm(model.get_submodule(path)))  # type: ignore[arg-type]


def _has_vector(module: nn.Module) -> bool:
    return any(p.ndim == 1 and n != "bias" for n, p in module.named_parameters(recurse=False))


def _touched(f: Fold) -> Iterable[str]:
    yield from f.own
    yield from (t.name for t in f.scaled)
    biases = f.biases if f.kind == "batchnorm" else ()  # type: ignore[union-attr]
    yield from (t.name for t in biases)
    yield from (m.bias for m in getattr(f, "readers", ()))


def _of_all(some: Iterable[Sequence[LinearMap]]) -> list[LinearMap]:
    return list({m.path: m for maps in some for m in maps}.values())
