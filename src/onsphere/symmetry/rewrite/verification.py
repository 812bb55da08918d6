"""What every rewrite needs of a model: its values, its outputs before and after, a copy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from onsphere._torch.copies import copy_of
from onsphere._torch.execution import (
    OutputPicker,
    bare_name,
    call,
    float_outputs,
    gradients_as_used,
    plain_execution,
    refuse_other_models,
    stand_ins,
)
from onsphere._torch.saved import places_of, put_back
from onsphere._torch.substitution import kept
from onsphere.errors import OnsphereError
from onsphere.symmetry.exact.eps_sites import EpsSite
from onsphere.symmetry.exact.writes import writes_taken_back
from onsphere.symmetry.numeric.float64_mode import Float64Mode, wide
from onsphere.symmetry.rewrite.folding.kinds.parametrizations import computed_weights

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Relative change of the output that counts as rounding, by the output's type."""
IN_FLOAT64 = 1e-8
"""Relative change of the output in float64 beyond which nothing is verified."""
_ROUNDINGS = 4.0
"""How many times the model's own rounding the output may move, where that is much."""


def refuse_without_values(model: nn.Module, error: type[OnsphereError], verb: str) -> None:
    """Raise ``error`` where weights are missing, elsewhere, or not numbers.

    Args:
        model: the model.
        error: what to raise.
        verb: what was to be done to the model, for the message.
    """
    refuse_other_models(model)
    parameters = dict(model.named_parameters())
    tensors = {**parameters, **dict(model.named_buffers())}
    if not tensors:
        raise error("the model has no weights")
    for name, t in tensors.items():
        if t.is_meta:
            raise error(f"{name!r} is on the meta device and has no values; load the weights")
        if name != bare_name(name) or hasattr(t, "device_mesh"):
            raise error(
                f"{name!r} is inside a wrapper or sharded; {verb} the plain model, and wrap it then"
            )
        with torch.no_grad():
            if t.is_floating_point() and t.layout is torch.strided and bool(t.isnan().any()):
                raise error(f"{name!r} holds NaN")
            if name in parameters and t.is_floating_point() and bool(t.isinf().any()):
                raise error(f"{name!r} holds an infinite number")


def refuse_shared_memory(model: nn.Module, error: type[OnsphereError]) -> None:
    """Raise ``error`` where writing into one weight would write into another, or twice into one."""
    owners: dict[int, str] = {}
    for name, p in model.named_parameters():
        if p.layout is not torch.strided or not p.numel():
            continue
        if any(s == 0 and n > 1 for s, n in zip(p.stride(), p.shape, strict=True)):
            raise error(
                f"the entries of {name!r} share memory (expand): give the model a copy of it"
            )
        other = owners.setdefault(p.untyped_storage()._cdata, name)
        if other != name:
            raise error(
                f"{name!r} and {other!r} are different views of the same memory, so neither can be "
                "written alone: leave out inplace=True, or give each memory of its own"
            )


def checked_tolerance(tolerance: float | None, error: type[OnsphereError]) -> None:
    """Raise ``error`` where a tolerance is no number of 0 or more."""
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and tolerance >= 0):
        raise error(f"tolerance is a number of 0 or more, got {tolerance!r}")


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Leave the buffers of a model as they are, whatever runs inside does to them."""
    buffers = dict(model.named_buffers())
    places = places_of(buffers.values())
    before = {n: b.detach().clone() for n, b in buffers.items() if not b.is_meta}
    try:
        yield
    finally:
        put_back(places)
        with torch.no_grad():
            for name, t in before.items():
                if not torch.equal(buffers[name], t):
                    buffers[name].copy_(t)


def refuse_nothing_to_compare(outputs: Sequence[Tensor], error: type[OnsphereError]) -> None:
    """Raise ``error`` where an output says nothing: it has no entries, or only NaN."""
    if any(not t.numel() for t in outputs):
        raise error("an output is empty on these inputs: there is nothing to verify the result on")
    if any(bool(t.isnan().all()) for t in outputs):
        raise error("an output is NaN on these inputs: there is nothing to verify the result on")


def copied(model: nn.Module, error: type[OnsphereError], instead: str = "") -> nn.Module:
    """Return a copy of a model, also of one with computed weights, or raise ``error``.

    Args:
        model: what to copy.
        error: what to raise.
        instead: what to do where it cannot be copied, for the message.
    """
    try:
        # What inference mode makes cannot be trained.
        with torch.inference_mode(False):
            return copy_of(model)
    except Exception as reason:
        first = (str(reason) or repr(reason)).splitlines()[0]
        raise error(f"the model cannot be copied ({first}){instead}") from reason


def wide_state(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights and buffers in float64, by the model's own names."""
    return {n: wide(t.detach()) for n, t in [*model.named_parameters(), *model.named_buffers()]}


def without_pruned(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with 0 where ``torch.nn.utils.prune`` has masked entries away."""
    masks = {
        f"{one.weight}_orig": state[f"{one.weight}_mask"]
        for one in computed_weights(model) if one.pruned
    }  # fmt: skip
    return {n: t * masks[n] if n in masks else t for n, t in state.items()}


def outputs_in_float64(
    model: nn.Module,
    state: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: OutputPicker | None,
    eps: Sequence[EpsSite] = (),
) -> list[Tensor]:
    """Run a model in float64 whatever it casts to, at its own eps.

    Args:
        model: the model.
        state: weights and buffers in float64, by the model's own names.
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors to return.
        eps: small constants to take as almost 0.
    """
    buffers = {n for n, _ in model.named_buffers()}
    fresh = {n: t.clone() if n in buffers else t.detach() for n, t in state.items()}
    given, named = tree_map(widened, (tuple(args), dict(kwargs)))
    mode = Float64Mode(eps, real_eps=not eps)

    def enter(path: str) -> None:
        mode.where = bare_name(path)

    with plain_execution(), mode.keeping(fresh.values(), all_else=True), gradients_as_used(model):
        result = call(model, fresh, given, named, enter, lambda t: wide(kept(t)))
        return [t.detach().clone() for t in float_outputs(result, output)]


def outputs_as_it_computes(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: OutputPicker | None,
) -> list[Tensor]:
    """Run a model as it is; its buffers stay."""
    with plain_execution(), torch.no_grad(), writes_taken_back(model.parameters()):
        result = call(model, stand_ins(model), args, kwargs)
        return [t.clone() for t in float_outputs(result, output)]


def allowed_change(own: Sequence[Tensor], rounding: float, tolerance: float | None) -> float:
    """Return how far an output may move.

    Args:
        own: the outputs of the model as given.
        rounding: their distance from those in float64, relative.
        tolerance: what was asked for.
    """
    if tolerance is not None:
        return tolerance
    return max(_ROUNDINGS * rounding, *(TOLERANCES.get(t.dtype, 1e-5) for t in own))


def refuse_moved(
    error: type[OnsphereError],
    change: float,
    in_float64: float,
    allowed: float,
    tolerance: float | None,
    where: str = "",
) -> None:
    """Raise ``error`` where the output would move too far, or in float64 by more than rounding.

    Args:
        error: what to raise.
        change: of the output, relative, as the model computes.
        in_float64: the same in float64.
        allowed: how far the output may move.
        tolerance: what was asked for.
        where: the mode, for the message.
    """
    certain = max(IN_FLOAT64, tolerance or 0.0)
    if not in_float64 <= certain:
        raise error(
            f"{where}in float64 the output would change by {in_float64:.1e} of its size, more than "
            f"{certain:.0e}: this model amplifies rounding so much that nothing can be verified, "
            "and is left as it was; accept it with a larger `tolerance`"
        )
    if not change <= allowed:
        raise error(
            f"{where}the output would change by {change:.1e} of its size, more than {allowed:.0e}, "
            f"so the model is left as it was (in float64 it would by {in_float64:.1e}); accept it "
            "with a larger `tolerance`"
        )


@contextmanager
def watched_inputs(
    modules: Mapping[str, nn.Module], look: Callable[[str, nn.Module, tuple[Any, ...]], object]
) -> Iterator[None]:
    """Call ``look`` with path, module and positional inputs before each of some modules runs."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, given: tuple[Any, ...]) -> None:
            look(path, module, given)

        return before

    hooks = [m.register_forward_pre_hook(hook(path)) for path, m in modules.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def widened(t: Any) -> Any:
    """Return a tensor in float64 that the model may write into, and anything else as it is."""
    return wide(t.detach().clone()) if isinstance(t, Tensor) else t
