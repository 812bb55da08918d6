"""Run a model as it is written, with other tensors in the place of its own, and say where."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as module_hooks

from onsphere.errors import OnsphereError

OutputPicker = Callable[[Any], Any]
"""Picks from a model's result the tensors that must not change."""

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class ModelError(OnsphereError, ValueError):
    """A model cannot be audited as given: it raises, has no weights, or no output to follow."""


def bare_name(name: str) -> str:
    """Return the name of a weight without the marks that wrappers leave in it."""
    for mark in _WRAPPERS:
        name = name.replace(mark, "")
    return name


def weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return parameters and persistent float buffers by the model's own names, tied ones once."""
    parameters: dict[str, Tensor] = {
        n: p for n, p in model.named_parameters() if p.is_floating_point() or p.is_complex()
    }
    persistent = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }
    buffers = {n: b for n, b in model.named_buffers() if n in persistent and b.is_floating_point()}
    return parameters, buffers


def float_outputs(result: Any, output: OutputPicker | None = None) -> list[Tensor]:
    """Return the real or complex tensors of a model's result, as picked by the user.

    Raises:
        ModelError: there is none.
    """
    picked = result if output is None else output(result)
    found = [t for t in _leaves(picked) if t.is_floating_point() or t.is_complex()]
    if not found:
        raise ModelError(
            f"the model returned {type(picked).__name__} with no floating-point tensor in it; "
            "give `output`, a function that picks the tensors to keep fixed"
        )
    return found


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, list | tuple | set | frozenset):
        for v in value:
            yield from _leaves(v)
    elif is_dataclass(value) and not isinstance(value, type):
        for v in vars(value).values():
            yield from _leaves(v)


@contextmanager
def module_paths(model: nn.Module, enter: Callable[[str], None]) -> Iterator[None]:
    """Tell ``enter`` the path of the module that runs, at every change."""
    paths = {id(m): name for name, m in model.named_modules()}
    stack = [""]

    def before(module: nn.Module, _: Any) -> None:
        stack.append(paths.get(id(module), stack[-1]))
        enter(stack[-1])

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        if len(stack) > 1:
            stack.pop()
        enter(stack[-1])

    first = module_hooks.register_module_forward_pre_hook(before)
    last = module_hooks.register_module_forward_hook(after)
    try:
        yield
    finally:
        first.remove()
        last.remove()


_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def _nothing_recomputed() -> Iterator[None]:
    """Run checkpointed parts of a model once: later its weights would be its own again."""
    from torch.utils import checkpoint

    def at_once(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)

    def nothing_saved(*_: Any, **__: Any) -> Iterator[None]:
        yield

    reentrant: Any = checkpoint.CheckpointFunction
    with (
        _replaced(reentrant, "apply", at_once),
        _replaced(checkpoint, "_checkpoint_without_reentrant_generator", nothing_saved),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    mine = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if mine is None:
            delattr(owner, name)
        else:
            setattr(owner, name, mine)


@contextmanager
def plain_execution() -> Iterator[None]:
    """Run models as written: no compiled graphs, no fused transformer layers, our own seed.

    Entered again inside itself it only seeds again.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if _PLAIN.get():
            yield
            return
        fastpath = torch.backends.mha.get_fastpath_enabled()
        token = _PLAIN.set(True)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                torch.compiler.set_stance("force_eager"),
                sdpa_kernel(SDPBackend.MATH),
                _nothing_recomputed(),
            ):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            _PLAIN.reset(token)


@contextmanager
def _substituted(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the place of a model's own, wherever those appear, and put them back.

    ``torch.func.functional_call`` does the same by name, but leaves a module that is registered
    under two names with the substitute.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    instead = {id(own[name]): tensor for name, tensor in state.items()}
    saved = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    recurrent = [(m, m._flat_weights) for m in model.modules() if isinstance(m, nn.RNNBase)]
    try:
        for module, parameters, buffers in saved:
            tables: Any = ((module._parameters, parameters), (module._buffers, buffers))
            for held, mine in tables:
                held.update({n: instead.get(id(t), t) for n, t in mine.items()})
        for module, _ in recurrent:
            names = module._flat_weights_names
            module.__dict__["_flat_weights"] = [module._parameters.get(n) for n in names]
        yield
    finally:
        for module, parameters, buffers in saved:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, flat in recurrent:
            module.__dict__["_flat_weights"] = flat


def call(
    model: nn.Module,
    state: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    enter: Callable[[str], None] | None = None,
) -> Any:
    """Run a model with other tensors in the place of its own; the model stays as it was.

    Args:
        model: the module.
        state: tensors by the model's own names.
        args: positional inputs.
        kwargs: keyword inputs.
        enter: told the path of the module that runs, at every change.

    Raises:
        ModelError: the model raised; the message says what and in which module.
    """
    where = [""]

    def entered(path: str) -> None:
        where[0] = path
        if enter is not None:
            enter(path)

    with module_paths(model, entered):
        try:
            with _substituted(model, state):
                return model(*args, **kwargs)
        except ModelError:
            raise
        except Exception as error:
            place = f" in module {where[0]!r}" if where[0] else ""
            first = (str(error) or repr(error)).splitlines()[0]
            raise ModelError(f"the model raised {type(error).__name__}{place}: {first}") from error
