"""Other tensors in the place of those that a model holds: its weights, and what it keeps beside.

Models keep tensors as plain attributes too, in lists and dictionaries: caches that they write into,
masks, states from one call to the next; so do their classes. All of them have substitutes while a
model runs, so that every run starts from the same state and leaves the model as it was.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from onsphere._torch.memory import key_of
from onsphere._torch.saved import Place, SavedMemory, places_of, put_back


@contextmanager
def substituted(
    model: nn.Module, state: Mapping[str, Tensor], held: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Put other tensors in the place of a model's own, wherever those appear, and put them back.

    ``torch.func.functional_call`` does the same by name, but leaves a module that is registered
    under two names with the substitute, and attributes that a model sets or fills as they are.

    Args:
        model: the module.
        state: tensors by the model's own names.
        held: makes the tensor that stands for one that the model keeps as a plain attribute.
    """
    modules, own = [], {}
    for path, module in model.named_modules():
        modules.append(module)
        before = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is not None:
                    own[before + name] = t
    instead = _Substitutes({id(own[n]): (own[n], t) for n, t in state.items()}, held)
    places = places_of(own.values())
    saved = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in modules]
    classes = [(c, dict(vars(c))) for c in _classes(modules)]
    shared = [(c, n, v) for c, names in classes for n, v in names.items() if _is_state(n, v)]
    try:
        for owner, name, value in shared:
            setattr(owner, name, instead(value))
        for module, attributes, parameters, buffers in saved:
            if parameters:
                module._parameters.update({n: instead(p) for n, p in parameters.items()})
            if buffers:
                module._buffers.update({n: instead(b) for n, b in buffers.items()})
            for name, value in attributes.items():
                if type(value) not in _PLAIN and name not in _OF_MODULES:
                    vars(module)[name] = instead(value)
        yield
    finally:
        for module, attributes, parameters, buffers in saved:
            vars(module).clear()
            vars(module).update(attributes)
            tables: Any = ((module._parameters, parameters), (module._buffers, buffers))
            for table, before in tables:
                table.clear()
                table.update(before)
        for owner, name, value in shared:
            setattr(owner, name, value)
        for owner, names in classes:
            for name in vars(owner).keys() - names.keys():
                delattr(owner, name)
        instead.undo()
        put_back([*places, *instead.places])


def _classes(modules: Iterable[nn.Module]) -> list[type]:
    """Return the classes of some modules that are not PyTorch's own."""
    types = dict.fromkeys(map(type, modules))
    found = {c: None for t in types for c in t.__mro__ if issubclass(c, nn.Module)}
    return [c for c in found if c.__module__.partition(".")[0] != "torch"]


def _is_state(name: str, value: Any) -> bool:
    """Return whether an attribute of a class may be state: a tensor, a number, a container."""
    if name.startswith("__"):
        return False
    return isinstance(value, Tensor) or type(value) in (bool, int, float, list, dict, tuple)


_PLAIN = frozenset({bool, int, float, str, type(None)})
"""What holds no tensor."""
_OF_MODULES = frozenset(vars(nn.Module()))
"""What every module has: its tables of weights, parts and hooks."""


class _Substitutes:
    """What stands in the place of a value of a model: of its weights, and of tensors it keeps.

    Lists and dictionaries stay the same objects, since parts of a model may share them.

    Args:
        weights: identity of a weight -> the weight and its substitute.
        held: makes the substitute of any other tensor.

    Attributes:
        places: of tensors that stand for themselves, as views of a weight do.
    """

    def __init__(
        self, weights: Mapping[int, tuple[Tensor, Tensor]], held: Callable[[Tensor], Tensor]
    ) -> None:
        self._made = dict(weights)
        self._by_memory = {key_of(t): (t, new) for t, new in weights.values() if t.numel()}
        self._held = held
        self._containers: list[tuple[Any, Any]] = []
        self.places: list[Place] = []

    def __call__(self, value: Any, depth: int = 3) -> Any:
        """Return the substitute of a value; what holds no tensor stays as it is."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if not depth or type(value) not in (list, dict, tuple) or len(value) > MOST_HELD:
            return value
        if isinstance(value, tuple):
            return tuple(self(v, depth - 1) for v in value)
        self._containers.append((value, value.copy()))
        if isinstance(value, list):
            value[:] = [self(v, depth - 1) for v in value]
        else:
            value.update({k: self(v, depth - 1) for k, v in value.items()})
        return value

    def undo(self) -> None:
        """Give lists and dictionaries back what they held."""
        for container, before in reversed(self._containers):
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)

    def _tensor(self, t: Tensor) -> Tensor:
        if id(t) not in self._made:
            own, new = self._by_memory.get(key_of(t), (t, t)) if t.numel() else (t, t)
            if own is t or own.stride() != new.stride():
                instead = self._held(t)
            elif key_of(own) == key_of(new):
                instead = t
                self.places += places_of([t])
            else:
                instead = _view_of(t, own, new)
            self._made[id(t)] = (t, instead)
        return self._made[id(t)][1]


MOST_HELD = 1000
"""Longer lists and dictionaries (vocabularies, data) are no state of a model."""


def _view_of(t: Tensor, own: Tensor, new: Tensor) -> Tensor:
    """Return the view of a substitute that ``t`` is of the weight itself."""
    offset = t.storage_offset() - own.storage_offset() + new.storage_offset()
    return new.as_strided(t.size(), t.stride(), offset)


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors back the memory that they showed before, and what it held."""
    tensors = list(tensors)
    places, memory = places_of(tensors), SavedMemory()
    for t in tensors:
        memory.save(t)
    try:
        yield
    finally:
        memory.put_back()
        put_back(places)


def kept(t: Tensor) -> Tensor:
    """Return a copy of a tensor that a model keeps beside its weights."""
    return t.detach().clone()
