"""A wrapped model, laid open: the bare module with whole weights, for as long as one looks at it.

``torch.compile`` and the data-parallel wrappers hide the module inside them. FSDP cuts weights into
shards and puts them together in hooks around each module; here they are put together once, and
the hooks rest. Fake tensors become tensors on the meta device. Afterwards everything is as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from onsphere._torch.execution import refuse_other_models

F = TypeVar("F", bound=Callable[..., Any])
_OPEN: ContextVar[nn.Module | None] = ContextVar("open", default=None)
"""The model that a function sees laid open."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile`` and the data-parallel wrappers."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif _is_flat_sharded(model):
            model = cast(nn.Module, model._fsdp_wrapped_module)
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def on_gathered(function: F) -> F:
    """Let a function of a model see the bare module with whole weights."""

    @wraps(function)
    def opened(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _OPEN.get() is model:  # by another such function, which calls this one
            return function(model, *args, **kwargs)
        with gathered(model) as inner:
            token = _OPEN.set(inner)
            try:
                return function(inner, *args, **kwargs)
            finally:
                _OPEN.reset(token)

    return cast(F, opened)


@contextmanager
def gathered(model: nn.Module, *, write: bool = False) -> Iterator[nn.Module]:
    """Give the bare module with whole weights.

    Where weights are sharded, every rank has to come here, and gets all of them.

    Args:
        model: any module.
        write: put what is written to the whole weights into the shards at the end.

    Yields:
        The module inside, to be run and read in place of the model.
    """
    refuse_other_models(model)
    with ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        if torch.is_inference_mode_enabled():  # there autograd is refused, not only turned off
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if any(map(_is_flat_sharded, model.modules())):
            from torch.distributed.fsdp import FullyShardedDataParallel

            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=write))
        inner = unwrapped(model)
        stack.enter_context(_without_wrappers(inner))
        stack.enter_context(_plain_tensors(inner, write))
        yield inner


def _is_flat_sharded(module: nn.Module) -> bool:
    return "_fsdp_wrapped_module" in module._modules


@contextmanager
def _without_wrappers(model: nn.Module) -> Iterator[None]:
    """Leave out the wrappers around parts of a model."""
    saved = [(m, dict(m._modules)) for m in model.modules()]
    try:
        for module, children in saved:
            inside = {n: unwrapped(c) for n, c in children.items() if c is not None}
            module._modules.update(inside)
        yield
    finally:
        for module, children in saved:
            module._modules.update(children)


@contextmanager
def _plain_tensors(model: nn.Module, write: bool) -> Iterator[None]:
    """Replace sharded, fake and flattened weights by whole ones with memory of their own.

    So are those that were made in inference mode, which autograd refuses.
    """
    saved = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    hooks = [(t, dict(t)) for m in model.modules() for t in _hooks_of_shards(m)]
    own = [t for _, ps, bs in saved for t in [*ps.values(), *bs.values()] if t is not None]
    pieces = _pieces(own)
    whole = {id(t): (t, _plain(t, id(t) in pieces)) for t in own}
    try:
        for module, parameters, buffers in saved:
            tables: Any = ((module._parameters, parameters), (module._buffers, buffers))
            for held, mine in tables:
                held.update({n: whole[id(t)][1] for n, t in mine.items() if t is not None})
        for table, _ in hooks:
            for key in [k for k, hook in table.items() if _belongs_to_shards(hook)]:
                del table[key]
        yield
        if write:
            _write_back(list(whole.values()))
    finally:
        for module, parameters, buffers in saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for table, before in hooks:
            table.clear()
            table.update(before)


def _plain(t: Tensor, piece: bool) -> Tensor:
    if isinstance(t, FakeTensor):
        plain = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")
    elif _is_sharded(t):
        plain = cast(Any, t).full_tensor().detach()
    elif piece or t.is_inference():
        plain = t.detach().clone()
    else:
        return t
    return nn.Parameter(plain, t.requires_grad) if isinstance(t, nn.Parameter) else plain


def _is_sharded(t: Tensor) -> bool:
    return hasattr(t, "full_tensor") and hasattr(t, "placements")


def _pieces(tensors: list[Tensor]) -> set[int]:
    """Return the tensors that share their memory with others without sharing an entry."""
    plain = [t for t in tensors if not isinstance(t, FakeTensor) and not _is_sharded(t)]
    sharing: dict[int, dict[int, Tensor]] = {}
    for t in plain:
        if not t.is_meta and t.numel():
            sharing.setdefault(t.untyped_storage()._cdata, {})[id(t)] = t
    found: set[int] = set()
    for group in sharing.values():
        spans = sorted((t.storage_offset(), _end(t)) for t in group.values())
        if all(end <= start for (_, end), (start, _) in pairwise(spans)) and len(spans) > 1:
            found |= set(group)
    return found


def _end(t: Tensor) -> int:
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return int(t.storage_offset() + reach + 1)


def _hooks_of_shards(module: nn.Module) -> list[dict[int, Any]]:
    """Return the tables that hold the hooks with which ``fully_shard`` gathers weights."""
    if not hasattr(module, "_get_fsdp_state"):
        return []
    return [cast(Any, module._forward_pre_hooks), cast(Any, module._forward_hooks)]


def _belongs_to_shards(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"


def _write_back(pairs: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for t, plain in pairs:
            if _is_sharded(t):
                from torch.distributed.tensor import distribute_tensor

                sharded: Any = t
                t.copy_(distribute_tensor(plain.detach(), sharded.device_mesh, sharded.placements))
            elif plain is not t and not isinstance(t, FakeTensor):
                with torch.inference_mode(t.is_inference()), torch.no_grad():
                    t.copy_(plain)
