r"""LayerNorm's centring into what writes its input, so that it is RMSNorm.

Where every reader of a sum takes the mean away first, each map that writes into the sum may write
without a mean: :math:`W \leftarrow (I - \mathbf 1\mathbf 1^\top/n)\,W`, and the same for biases and
rows of embeddings. Then the input of the norm has no mean, and LayerNorm and RMSNorm are one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from onsphere._torch.execution import ModelError, OutputPicker, bare_name
from onsphere.symmetry.exact.trace import trace
from onsphere.symmetry.numeric.certificate import relative_change
from onsphere.symmetry.numeric.group_testing import group_test
from onsphere.symmetry.numeric.probe import NoGradients, Point, Probe
from onsphere.symmetry.rewrite.folding.linear_maps import linear_maps
from onsphere.symmetry.rewrite.folding.targets import State
from onsphere.symmetry.rewrite.reach import may_meet, not_reached
from onsphere.symmetry.rewrite.verification import watched_inputs

_BALANCED = 1e-7
"""Sum of a gradient over entries that may move together, relative to the sum of its sizes."""
_EXACT = 1e-10
"""Relative change of the output at random weights up to which a weight may be centred."""
_NO_MEAN = 1e-10
"""Mean of a norm's input, relative to its largest entry, that is rounding."""
_COTANGENTS = 2


@dataclass(frozen=True)
class Center:
    """A weight that may lose its mean along an axis.

    Args:
        name: of the parameter.
        axis: the features that a norm reads lie along it.
    """

    name: str
    axis: int

    def applied(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight without its mean."""
        t = state[self.name]
        return t - t.mean(self.axis, keepdim=True)


@dataclass(frozen=True)
class Centering:
    """What may be centred in a model, and what that does to its norms.

    Args:
        centers: the weights.
        norms: paths of the LayerNorms whose input then has no mean.
        others: paths of the other LayerNorms, and why.
    """

    centers: tuple[Center, ...] = ()
    norms: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()

    def applied(self, state: State) -> State:
        """Return what changes, in float64."""
        changed: State = {}
        for c in self.centers:
            changed[c.name] = c.applied({**state, **changed})
        return changed


def layer_norms(model: nn.Module) -> dict[str, nn.LayerNorm]:
    """Return the LayerNorms over one axis, by path."""
    found = model.named_modules()
    return {
        p: m for p, m in found
        if isinstance(m, nn.LayerNorm) and len(m.normalized_shape) == 1
    }  # fmt: skip


def propose_centering(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: OutputPicker | None,
    missed: Mapping[str, Sequence[int]],
) -> Centering:
    """Find the weights whose mean no reader sees: by gradients, then by moving them.

    A weight may lose its mean along an axis if the gradient sums to 0 along it, at random weights
    and inputs, and the output stays when all of them lose it.

    Args:
        model: the model.
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors that must not change.
        missed: weights that the inputs do not reach: they may read what is centred.
    """
    norms, unseen = layer_norms(model), []
    for path, m in list(norms.items()):
        other = may_meet(missed, m.normalized_shape[0])
        if other is not None:
            unseen.append((path, not_reached(other)))
            del norms[path]
    if not norms:
        return Centering(others=tuple(unseen))
    return _found(model, args, kwargs, output, norms, unseen)


def _found(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: OutputPicker | None,
    norms: Mapping[str, nn.LayerNorm],
    unseen: Sequence[tuple[str, str]],
) -> Centering:
    try:
        probe = Probe(model, args, kwargs, trace(model, args, kwargs, output=output), output=output)
        point = probe.redrawn()
        point = point if probe.runs(point) else probe.given()
        found = _balanced(probe, point, _candidates(model, norms))
    except (NoGradients, ModelError) as error:
        reason = f"whether its input may lose its mean is unknown ({error})"
        return Centering(others=(*unseen, *((p, reason) for p in norms)))

    def wrong(some: Sequence[Center]) -> float:
        after = probe.outputs(_moved(point, some), real_eps=True)
        return relative_change(probe.baseline(point, real_eps=True), after)

    measured = group_test(found, wrong, _EXACT)
    held = [c for c, w in zip(found, measured, strict=True) if w <= _EXACT]
    if held and wrong(held) > _EXACT:
        held = []
    without = _without_mean(probe, norms, [_moved(p, held) for p in (point, probe.given())])
    if not without:
        return Centering(others=(*unseen, *((p, _STAYS) for p in norms)))
    others = ((p, _STAYS) for p in norms if p not in without)
    return Centering(tuple(held), tuple(without), (*unseen, *others))


_STAYS = "its input keeps a mean: others read it as well, or more than linear maps write it"


def as_rms_norm(module: nn.LayerNorm) -> nn.RMSNorm:
    """Return the RMSNorm that a LayerNorm without a shift is on inputs without a mean."""
    made = nn.RMSNorm(
        tuple(module.normalized_shape), eps=module.eps, elementwise_affine=module.weight is not None
    )
    if module.weight is not None:
        made.weight = module.weight
    return made.train(module.training)


def can_be_rms_norm(module: nn.Module) -> bool:
    """Return whether a module is PyTorch's own LayerNorm, without a shift that does something."""
    bias = getattr(module, "bias", None)
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(module) is nn.LayerNorm and not hooked and (bias is None or not bool(bias.any()))


def _candidates(model: nn.Module, norms: Mapping[str, nn.LayerNorm]) -> list[Center]:
    """Return the axes along which weights are as long as what norms read.

    Of linear maps the outputs, of embeddings the entries of a row, of other weights every axis.
    """
    sizes = {m.normalized_shape[0] for m in norms.values()}
    own = {id(p) for m in norms.values() for p in m.parameters()}
    axes: dict[str, tuple[int, ...]] = {}
    for name, maps in linear_maps(model).items():
        plain = all(not (m.transposed and m.groups > 1) for m in maps)
        axes[name] = tuple({m.rows for m in maps}) if plain else ()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = []
    for name, p in model.named_parameters():
        if id(p) in own:
            continue
        at = (1,) if id(p) in tables else axes.get(bare_name(name), range(p.ndim))
        found += [Center(name, a) for a in at if p.shape[a] in sizes]
    return found


def _balanced(probe: Probe, point: Point, candidates: Sequence[Center]) -> list[Center]:
    """Return the candidates along whose axis gradients sum to 0, and are not all 0."""
    names = list(dict.fromkeys(b for c in candidates if (b := bare_name(c.name)) in probe.names))
    worst = dict.fromkeys((c for c in candidates if bare_name(c.name) in names), 0.0)
    moved: set[str] = set()
    for gradients in probe.gradients(point, _COTANGENTS, names=names) if names else ():
        for c in worst:
            g = gradients.by_name.get(bare_name(c.name))
            if g is None or not bool(g.any()):
                continue
            moved.add(c.name)
            sizes = g.abs().sum(c.axis)
            worst[c] = max(worst[c], float(g.sum(c.axis).abs().max() / sizes.max()))
    return [c for c, w in worst.items() if w <= _BALANCED and c.name in moved]


def _moved(point: Point, centers: Sequence[Center]) -> Point:
    state = dict(point.state)
    for c in centers:
        state[c.name] = c.applied(state)
    return replace(point, state=state)


def _without_mean(
    probe: Probe, norms: Mapping[str, nn.LayerNorm], points: Sequence[Point]
) -> list[str]:
    """Return the norms whose inputs have no mean at any of some points."""
    largest: dict[str, float] = {}

    def look(path: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].detach()
        size = float(x.abs().max()) or 1.0
        mean = float(x.mean(-1).abs().max()) / size
        largest[path] = max(largest.get(path, 0.0), mean)

    with watched_inputs(norms, look):
        for point in points:
            probe.outputs(point, real_eps=True)
    return [p for p in norms if largest.get(p, 1.0) <= _NO_MEAN]
