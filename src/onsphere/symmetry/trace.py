"""Run a model once and write down what its operations demand of the units of its weights."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from onsphere.errors import OnsphereError
from onsphere.symmetry.gathered import on_gathered
from onsphere.symmetry.gathered import unwrapped as unwrapped
from onsphere.symmetry.operation import EpsSite, Ledger, Operation
from onsphere.symmetry.rules import rule_of
from onsphere.symmetry.units import ANY, ZERO, Form, Unit, row_space, sparse_basis

OutputPicker = Callable[[Any], Any]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_ROLES = {
    "convolution": "convolution",
    "embedding": "embedding",
    "bmm": "experts",
    "baddbmm": "experts",
    "_grouped_mm": "experts",
}
"""What an operation says about the weights that go into it."""
_ATTENTION = {"_softmax", "_safe_softmax"}
_DATA_DEPENDENT = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


class ModelError(OnsphereError, ValueError):
    """A model cannot be audited as given: it raises, has no weights, or no output to follow."""


@dataclass(frozen=True)
class UnknownOp:
    """An operation without a rule; its inputs were pinned to unit 0.

    Args:
        name: qualified name, as ``"aten::fft_foo"``.
        where: path of the module that ran it.
    """

    name: str
    where: str


@dataclass(frozen=True)
class Trace:
    """What one run of a model says about the units of its weights.

    Args:
        parameters: names of the parameters, tied ones once, in the order of the model.
        buffers: names of the persistent float buffers.
        basis: exponents by name: a basis of all scale symmetries of the parameters. Buffers
            appear beside them where they have to move along.
        exact: a basis of the part that the real eps does not break either: no eps stands beside
            anything that these scale.
        followers: for each vector of the basis, buffers that only *estimate* (running statistics
            in training mode) and should move along although the output does not need it.
        rounded: units of the tensors that the model rounds to a shorter type while it runs. A
            rescale by 2 to the power of a whole number passes through such a rounding unnoticed.
        eps: constants that break symmetries through their smallness only.
        unknown: operations without a rule.
        unread: parameters that no operation touched.
        data_dependent: whether the values of tensors decided what ran.
        written: buffers that the model writes while it runs.
        roles: what the model does with a weight: ``"convolution"``, ``"experts"`` (a matrix per
            entry of its first axis), ``"embedding"``, ``"heads=4"`` (its module holds an attention
            with so many heads).
    """

    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    basis: tuple[Mapping[str, Fraction], ...]
    exact: tuple[Mapping[str, Fraction], ...]
    followers: tuple[Mapping[str, Fraction], ...]
    rounded: tuple[Mapping[str, Fraction], ...]
    eps: tuple[EpsSite, ...]
    unknown: tuple[UnknownOp, ...]
    unread: tuple[str, ...]
    data_dependent: bool
    written: frozenset[str]
    roles: Mapping[str, frozenset[str]] = field(default_factory=dict)


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


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every operation that a model executes and applies its rule."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.touched: set[int] = set()
        self.written: set[int] = set()
        self.roles: defaultdict[int, set[str]] = defaultdict(set)
        self.heads: dict[str, int] = {}
        self.data_dependent = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.touched.update(id(t) for t in tensors)
        self.touched.update(t.untyped_storage()._cdata for t in tensors)
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self._note_roles(func._schema.name.removeprefix("aten::"), tensors)
        if func._schema.name in _DATA_DEPENDENT:
            self.data_dependent = True
        operation = Operation(self.ledger, func, args, kwargs, result)
        rule = rule_of(operation.name)
        units = self._pin(operation) if rule is None else rule(operation)
        self._describe(func, args, kwargs, results, units)
        return result

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation; a question about a tensor without memory is asked of its shadow."""
        if func._schema.name in _DATA_DEPENDENT and args[0].is_meta:
            value = self.ledger.shadows.value(args[0])
            if value is not None:
                return func(value, *args[1:], **kwargs)
            raise self._needs_values(func)
        if func._schema.name == "aten::index":
            args = (args[0], self.ledger.shadows.positions(args[1]), *args[2:])
        try:
            result = func(*args, **kwargs)
        except NotImplementedError as error:
            if torch.Tag.dynamic_output_shape in func.tags:
                raise self._needs_values(func) from error
            raise
        self.ledger.shadows.follow(func, args, kwargs, result)
        return result

    def _note_roles(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Remember what a weight is for; only words depend on it."""
        if name in _ROLES:
            for tensor in tensors[:2]:
                self.roles[tensor.untyped_storage()._cdata].add(_ROLES[name])
        elif name in _ATTENTION and tensors[0].ndim == 4:
            self.heads[self.ledger.where] = tensors[0].shape[1]

    def _needs_values(self, func: Any) -> ModelError:
        place = f"module {self.ledger.where!r}" if self.ledger.where else "the model"
        return ModelError(
            f"what {place} computes depends on the values of a tensor ({func._schema.name}), and "
            "this model has none: it was built without memory. Give inputs with values if it is "
            "they that decide, or else build the model with memory"
        )

    def _pin(self, operation: Operation) -> Unit:
        """Treat an operation nobody described: its inputs must have unit 0."""
        reduced = self.ledger.constraints.reduced
        units = [operation.unit(t) for t in operation.tensors()]
        if any(u.terms for u in units):
            known = all(not reduced(u.terms) for u in units)
            for unit in units:
                self.ledger.require_zero(unit.terms)
            if not known:
                self.ledger.unknown[operation.name, self.ledger.where] = None
        return ZERO

    def _describe(
        self, func: Any, args: Sequence[Any], kwargs: Any, results: list[Tensor], units: Any
    ) -> None:
        read = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        written = _written(func, args, kwargs)
        self.written |= written
        for i, tensor in enumerate(results):
            unit = units if isinstance(units, Unit) else units[min(i, len(units) - 1)]
            key = tensor.untyped_storage()._cdata
            if key in written:
                self.ledger.update(tensor, unit)
            elif key not in read:
                self.ledger.write(tensor, unit)
            if unit.terms and _shortens(tensor, args):
                self.ledger.rounded.append(dict(unit.terms))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    found: set[int] = set()
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found |= {
                t.untyped_storage()._cdata for t in tree_leaves(value) if isinstance(t, Tensor)
            }
    return found


def _shortens(result: Tensor, args: Sequence[Any]) -> bool:
    """Return whether a result has fewer digits than a tensor it was made from."""
    inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    digits = [torch.finfo(t.dtype).eps for t in inputs if t.is_floating_point() or t.is_complex()]
    real = result.is_floating_point() or result.is_complex()
    return real and bool(digits) and torch.finfo(result.dtype).eps > min(digits)


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


@on_gathered
def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: OutputPicker | None = None,
    inert: Collection[str] = (),
) -> Trace:
    """Find all scale symmetries of a model at the level of whole tensors, exactly.

    Args:
        model: any module, in the mode it is to be analysed in; on the meta device it needs no
            memory.
        args: positional inputs of ``forward``.
        kwargs: keyword inputs.
        output: picks from the result the tensors that must not change; all float tensors without.
        inert: parameters known not to affect the output: they could as well be 0, which fits any
            unit, so they constrain nothing.

    Returns:
        The symmetries and what the analysis could not follow.

    Raises:
        ModelError: the model has no parameters, raises, or returns no float tensor.

    Example:
        >>> norm = nn.LayerNorm(4, elementwise_affine=False)
        >>> net = nn.Sequential(nn.Linear(3, 4, bias=False), norm, nn.Linear(4, 2))
        >>> [dict(v) for v in trace(net, (torch.ones(5, 3),)).basis]
        [{'0.weight': Fraction(1, 1)}]
    """
    parameters, buffers = weights(model)
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no parameters")
    names = [*parameters, *buffers]
    ledger = Ledger(len(names))
    state = {n: b.clone() for n, b in model.named_buffers()}
    held = {**parameters, **{n: state[n] for n in buffers}}
    _introduce(ledger, names, held, inert)
    tracer = _Tracer(ledger)

    inputs = (tuple(args), dict(kwargs or {}))
    if any(p.is_meta for p in parameters.values()):
        inputs = tree_map(ledger.shadows.to_meta, inputs)

    def enter(path: str) -> None:
        ledger.where = bare_name(path)

    with plain_execution(), torch.no_grad(), tracer:
        result = call(model, {**parameters, **state}, *inputs, enter)
        outputs = float_outputs(result, output)
    for tensor in outputs:
        unit = ledger.settle(ledger.read(tensor))
        ledger.require_zero(unit.terms)
    touched = tracer.touched | {t.untyped_storage()._cdata for t in outputs}
    return _concluded(ledger, parameters, buffers, held, touched, tracer)


def _introduce(
    ledger: Ledger, names: Sequence[str], held: Mapping[str, Tensor], inert: Collection[str]
) -> None:
    """Give every weight its own unknown; weights that share memory share one unit."""
    for unknown, name in enumerate(names):
        seen = ledger.read(held[name])
        if bare_name(name) in inert:
            ledger.write(held[name], ANY)
        elif seen.terms:
            ledger.require_zero(seen.terms, Unit.of(unknown).terms)
        else:
            ledger.write(held[name], Unit.of(unknown))


def _concluded(
    ledger: Ledger,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    touched: set[int],
    tracer: _Tracer,
) -> Trace:
    names = [*map(bare_name, parameters), *map(bare_name, buffers)]
    vectors = ledger.constraints.null_space()
    count = len(parameters)
    kept = sparse_basis(row_space(vectors, set(range(count))), count)
    kept = [_without_idle_buffers(v, vectors, count) for v in kept]
    follow = [_following(v, ledger, set(range(count, len(names)))) for v in kept]
    for site in list(ledger.sites.values()):
        ledger.require_zero(site.form)
    exact = row_space(ledger.constraints.null_space(), set(range(count)))
    exact = [_without_idle_buffers(v, vectors, count) for v in exact]
    unread = [
        n
        for n, p in zip(names, parameters.values(), strict=False)
        if id(p) not in touched and p.untyped_storage()._cdata not in touched
    ]
    written = tracer.written | ledger.estimates
    return Trace(
        parameters=tuple(names[:count]),
        buffers=tuple(names[count:]),
        basis=tuple({names[k]: c for k, c in v.items()} for v in kept),
        exact=tuple({names[k]: c for k, c in v.items()} for v in exact),
        followers=tuple({names[k]: c for k, c in v.items()} for v in follow),
        rounded=_named(ledger.rounded, names),
        eps=tuple(replace(s, form={}) for s in ledger.sites.values()),
        unknown=tuple(UnknownOp(*key) for key in ledger.unknown),
        unread=tuple(unread),
        data_dependent=tracer.data_dependent,
        written=frozenset(
            bare_name(n) for n in buffers if held[n].untyped_storage()._cdata in written
        ),
        roles={n: _roles(n, held[own], tracer) for n, own in zip(names, parameters, strict=False)},
    )


def _roles(name: str, weight: Tensor, tracer: _Tracer) -> frozenset[str]:
    inside = [path for path in tracer.heads if path and name.startswith(f"{path}.")]
    heads = {f"heads={tracer.heads[max(inside, key=len)]}"} if inside else set()
    return frozenset(tracer.roles.get(weight.untyped_storage()._cdata, set()) | heads)


def _named(forms: Sequence[Form], names: Sequence[str]) -> tuple[Mapping[str, Fraction], ...]:
    different = {frozenset(form.items()) for form in forms}
    return tuple({names[k]: c for k, c in sorted(form)} for form in sorted(different, key=sorted))


def _without_idle_buffers(v: Form, vectors: Sequence[Form], count: int) -> Form:
    """Drop from a symmetry the buffers that are free to do what they like."""
    idle = {next(iter(u)) for u in vectors if len(u) == 1 and next(iter(u)) >= count}
    return {k: c for k, c in v.items() if k not in idle}


def _following(v: Form, ledger: Ledger, buffers: set[int]) -> Form:
    """Return how far estimating buffers move when a symmetry acts, where that is well defined."""
    found: dict[int, set[Fraction]] = {}
    for buffer, unit in ledger.followers:
        (name,) = buffer.terms if len(buffer.terms) == 1 else (None,)
        if name in buffers and name not in v:
            power = sum((c * v.get(k, Fraction(0)) for k, c in unit.terms.items()), Fraction(0))
            found.setdefault(name, set()).add(power)
    return {k: p.pop() for k, p in found.items() if len(p) == 1 and p != {Fraction(0)}}
