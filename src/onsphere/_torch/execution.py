"""Run a model as it is written, with other tensors in the place of its own, and say where."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import is_dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as module_hooks
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from onsphere._torch.signatures import misfit, misspelt, named_inputs, on_dictionary
from onsphere._torch.substitution import kept, substituted
from onsphere.errors import OnsphereError

OutputPicker = Callable[[Any], Any]
"""Picks from a model's result the tensors that must not change."""

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class ModelError(OnsphereError, ValueError):
    """A model cannot be audited as given: it raises, has no weights, or no output to follow."""


@lru_cache(maxsize=65_536)
def bare_name(name: str) -> str:
    """Return the name of a weight without the marks that wrappers leave in it."""
    for mark in _WRAPPERS:
        name = name.replace(mark, "")
    return name


def weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return parameters and persistent float buffers by the model's own names, tied ones once.

    The masks of ``torch.nn.utils.prune`` are left out: they say which entries there are.
    """
    parameters: dict[str, Tensor] = {
        n: p for n, p in model.named_parameters() if p.is_floating_point() or p.is_complex()
    }
    persistent = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set and not _is_pruning_mask(module, name)
    }
    buffers = {n: b for n, b in model.named_buffers() if n in persistent and b.is_floating_point()}
    return parameters, buffers


def _is_pruning_mask(module: nn.Module, name: str) -> bool:
    hooks = (h for h in module._forward_pre_hooks.values() if isinstance(h, BasePruningMethod))
    return any(name == f"{hook._tensor_name}_mask" for hook in hooks)


def float_outputs(result: Any, output: OutputPicker | None = None) -> list[Tensor]:
    """Return the real or complex tensors of a model's result, as picked by the user.

    Raises:
        ModelError: there is none, or ``output`` is no function.
    """
    picked = _picked(result, output)
    tensors = (t for t in _leaves(picked) if isinstance(t, Tensor))
    found = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    if not found:
        raise ModelError(
            f"the model returned {type(picked).__name__} with no floating-point tensor in it; "
            "give `output`, a function that picks the tensors to keep fixed"
        )
    return found


def numbers(result: Any, output: OutputPicker | None = None) -> list[Tensor]:
    """Return the real numbers and arrays of a model's result that are no tensors."""
    found = _leaves(_picked(result, output))
    return [torch.as_tensor(x, dtype=torch.float64) for x in found if _is_number(x)]


def _picked(result: Any, output: OutputPicker | None) -> Any:
    if output is not None and not callable(output):
        raise ModelError(
            "output is a function that picks tensors from what the model returns, as "
            f"lambda result: result[0], got {output!r}"
        )
    if output is None:
        return result
    try:
        return output(result)
    except OnsphereError:
        raise
    except Exception as error:
        raise ModelError(
            f"output raised {type(error).__name__}: {error}; it was given what the model returned, "
            f"a {type(result).__name__}"
        ) from error


def _is_number(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return np.issubdtype(value.dtype, np.floating)
    return isinstance(value, float | np.floating)


def inputs_of(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword inputs as ``forward`` takes them.

    A dictionary (a batch of a data loader, of a tokenizer) given as ``args`` goes in by keyword
    where ``forward`` takes its keys by name, and as the one positional input where it takes none.
    What is no tuple or list is one positional input.

    Raises:
        ModelError: ``forward`` takes some of the keys and not the others; a nested tensor; a numpy
            array or a data loader in place of a tensor.
    """
    _refuse_nested((args, kwargs))
    if any(isinstance(t, Tensor) and t.is_inference() for t in _leaves((args, kwargs))):
        args, kwargs = tree_map(_ordinary, (args, kwargs))
    named = dict(kwargs or {})
    if isinstance(args, np.ndarray):
        raise ModelError(
            "the input is a numpy array; give a tensor, as torch.from_numpy(array), of the dtype "
            f"that the model takes (this one is {args.dtype})"
        )
    if isinstance(args, torch.utils.data.DataLoader):
        raise ModelError(
            "the input is a data loader; give one batch of it, as next(iter(loader)), or of that "
            "the inputs without labels"
        )
    if isinstance(args, PackedSequence):  # which is a tuple as well
        return (args,), named
    if args is None:
        return (), named
    if isinstance(args, Mapping):
        batch = dict(args)
        return ((), {**batch, **named}) if _takes(model, batch) else ((args,), named)
    return tuple(args) if isinstance(args, tuple | list) else (args,), named


def _ordinary(value: Any) -> Any:
    """Return a copy of a tensor that was made in inference mode, which autograd refuses."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _refuse_nested(inputs: Any) -> None:
    """Raise where an input is a nested tensor, whose rows have lengths of their own."""
    if any(isinstance(t, Tensor) and t.is_nested for t in _leaves(inputs)):
        raise ModelError(
            "an input is a nested tensor, of which no entry can be moved alone; give a padded one "
            "(torch.nested.to_padded_tensor) with its mask, or a batch of equal lengths"
        )


def _takes(model: nn.Module, names: Mapping[str, Any]) -> bool:
    """Return whether ``forward`` takes each of these names, or any name at all."""
    told = named_inputs(model)
    if told is None:
        return False
    some, takes_any = told
    unknown = [str(n) for n in names if n not in some]
    if not unknown or takes_any:
        return True
    if len(unknown) < len(names):
        raise ModelError(
            f"forward of {type(model).__name__} takes {', '.join(some)}, and not "
            f"{', '.join(unknown)}, which the batch holds as well; leave that out"
        )
    return False


def refuse_other_models(model: object) -> None:
    """Raise where a model is no module, or one whose weights are not there or cannot be replaced.

    Raises:
        ModelError: something else than a module is given; TorchScript; a lazy module that has not
            run yet.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a torch.nn.Module, got a {type(model).__name__}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(
                f"{name!r} is not initialized yet, as its module is lazy: run the model once on a "
                "batch, which gives it its shape"
            )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"module {path!r} of the model" if path else "the model"
            raise ModelError(
                f"{what} is a ScriptModule (torch.jit), which does not let its weights be "
                "replaced; give the nn.Module that it was made from"
            )


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what a result holds, its containers opened."""
    inside: Iterable[Any]
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inside = value
    elif is_dataclass(value) and not isinstance(value, type):
        inside = vars(value).values()
    else:
        yield value
        return
    for v in inside:
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
_CPU = torch.device("cpu")
_DEVICE: ContextVar[torch.device] = ContextVar("device", default=_CPU)
"""Where a model makes its tensors as the user runs it; ours are made on the CPU."""


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Make tensors on the CPU, also inside ``with torch.device(...)`` of the user."""
    device = torch.get_default_device()
    if device == _CPU:
        yield
        return
    token = _DEVICE.set(device)
    try:
        with _CPU:
            yield
    finally:
        _DEVICE.reset(token)


def _on_its_device() -> AbstractContextManager[Any]:
    """Make tensors where the user's code makes them."""
    device = _DEVICE.get()
    return nullcontext() if device == _CPU else device


@contextmanager
def _nothing_recomputed() -> Iterator[None]:
    """Run checkpointed parts of a model once: later its weights would be its own again."""
    from torch.utils import checkpoint

    def at_once(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)

    def nothing_saved(*_: Any, **__: Any) -> Iterator[None]:
        yield

    reentrant: Any = checkpoint.CheckpointFunction
    with ExitStack() as replaced:
        replaced.enter_context(_replaced(reentrant, "apply", at_once))
        # The latter since PyTorch 2.14.
        for ending in ("", "_impl"):
            name = f"_checkpoint_without_reentrant_generator{ending}"
            if hasattr(checkpoint, name):
                replaced.enter_context(_replaced(checkpoint, name, nothing_saved))
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


def _follows_seed(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return NumPy's maker of generators, which without a seed takes one from the global state."""

    def made(seed: Any = None) -> Any:
        return make(np.random.randint(2**31) if seed is None else seed)  # noqa: NPY002

    return made


def _seed(seed: int) -> None:
    """Seed every source of random numbers that a model may draw from."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed, in a tenth of its time
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - a model may use it


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every source of random numbers that a model may draw from, and put them back."""
    ours, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    torchs = torch.default_generator.get_state()
    _seed(seed)
    try:
        with _replaced(np.random, "default_rng", _follows_seed(np.random.default_rng)):
            yield
    finally:
        torch.default_generator.set_state(torchs)
        random.setstate(ours)
        np.random.set_state(numpys)  # noqa: NPY002


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled functions as written; there are none before PyTorch's compiler is imported."""
    compiler = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiler else nullcontext()


@contextmanager
def plain_execution(seed: int = 0) -> Iterator[None]:
    """Run models as written: no compiled graphs, no fused transformer layers, our own seed.

    Entered again inside itself it only seeds again.

    Args:
        seed: of all random numbers that the model draws, by PyTorch, Python or NumPy.
    """
    if _PLAIN.get():
        _seed(seed)
        yield
        return
    with _seeded(seed):
        fastpath = torch.backends.mha.get_fastpath_enabled()
        token = _PLAIN.set(True)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                _on_cpu(),
                _uncompiled(),
                sdpa_kernel(SDPBackend.MATH),
                _nothing_recomputed(),
            ):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            _PLAIN.reset(token)


def drawn_by_python() -> object:
    """Return what changes when a model draws random numbers by Python or NumPy."""
    numpys: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpys[1].tobytes(), numpys[2:]


def gradients_as_used(model: nn.Module, differentiates: bool = False) -> torch.set_grad_enabled:
    """Let autograd be on in training mode and off in evaluation mode: some models ask.

    Args:
        model: the module.
        differentiates: whether it takes gradients itself while it runs.
    """
    return torch.set_grad_enabled(model.training or differentiates)


def leaf_as(own: Tensor, t: Tensor) -> Tensor:
    """Return a tensor in the place of a weight, which wants gradients where that one does."""
    wants = own.requires_grad and (t.is_floating_point() or t.is_complex())
    return t if t.requires_grad else t.detach().requires_grad_(wants)


def stand_ins(model: nn.Module) -> dict[str, Tensor]:
    """Return views of parameters and copies of buffers, to run a model without gradients."""
    views = {n: p.detach() for n, p in model.named_parameters()}
    return {**views, **{n: b.detach().clone() for n, b in model.named_buffers()}}


def call(
    model: nn.Module,
    state: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    enter: Callable[[str], None] | None = None,
    held: Callable[[Tensor], Tensor] = kept,
) -> Any:
    """Run a model with other tensors in the place of its own; the model stays as it was.

    Args:
        model: the module.
        state: tensors by the model's own names.
        args: positional inputs.
        kwargs: keyword inputs.
        enter: told the path of the module that runs, at every change.
        held: makes the tensor that stands for one that the model keeps as a plain attribute.

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
            with _on_its_device(), substituted(model, state, held):
                return model(*args, **kwargs)
        except OnsphereError:
            raise
        except Exception as error:
            problem = misfit(model, args, kwargs) if isinstance(error, TypeError) else None
            if problem is not None:
                raise ModelError(problem) from error
            place = f" in module {where[0]!r}" if where[0] else ""
            first = (str(error) or repr(error)).splitlines()[0]
            if "flex_attention" in first or "FlexAttention" in first:
                raise ModelError(
                    f"the model calls flex_attention{place}, whose kernels cannot be followed; "
                    "give it with scaled_dot_product_attention in its place (in transformers: "
                    "attn_implementation='sdpa'), which has the same symmetries"
                ) from error
            if "more than 1 value per channel when training" in first:
                first += "; give more than one example, or ask about evaluation mode"
            first += on_dictionary(args, error) + misspelt(model, kwargs)
            raise ModelError(f"the model raised {type(error).__name__}{place}: {first}") from error
