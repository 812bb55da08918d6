"""What an input passes on its way through a model: every layer that runs, in the order it runs.

A *layer* is a module inside which no other module runs, or one that the caller chose. A module that
runs twice is two layers. Modules are watched by hooks, which are gone when the passage ends, by
whatever way it ends.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onsphere.errors import OnsphereError, nearest
from onsphere.robustness.classifier import Classifier


def inside(model: nn.Module) -> nn.Module:
    """Return the model that its user knows: inside a classifier, or what compiling made of it.

    Example:
        >>> type(inside(Classifier(nn.Flatten()))).__name__
        'Flatten'
    """
    while True:
        inner = model.model if isinstance(model, Classifier) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@dataclass(frozen=True)
class Call:
    """One run of one layer.

    Args:
        name: the module's path in the model; empty for the model itself.
        number: how often this module had run before.
        module: the module.
        follows: whether its input is the very tensor that the layer before it has returned.
        alone: whether it was given that one tensor and nothing else.
    """

    name: str
    number: int
    module: nn.Module = field(compare=False)
    follows: bool = field(compare=False, default=False)
    alone: bool = field(compare=False, default=True)

    @property
    def label(self) -> str:
        """Its name in tables: the path, and which run of it where it ran before."""
        name = self.name or type(self.module).__name__
        return f"{name} ({self.number + 1})" if self.number else name


Seen = Callable[[Call, Tensor, Tensor], None]
"""Told of each layer as it ends: which, what it was given, what it made."""


class LayerTraceError(OnsphereError, ValueError):
    """A model cannot be followed layer by layer; the message says why."""


def first_tensor(value: Any) -> Tensor | None:
    """Return the first floating-point tensor in a result: itself, or in a tuple, list or dict.

    Example:
        >>> first_tensor((None, torch.zeros(2), torch.ones(3)))
        tensor([0., 0.])
    """
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    parts: Sequence[Any] = ()
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, tuple | list):
        parts = value
    return next((t for t in map(first_tensor, parts) if t is not None), None)


def _ignore(_: str) -> None:
    pass


@dataclass
class _Running:
    """A module that has begun and not ended."""

    given: Tensor | None
    follows: bool
    alone: bool
    is_leaf: bool = True


class _Watch:
    """Keeps the stack of running modules and tells of those that are layers."""

    def __init__(
        self, model: nn.Module, chosen: frozenset[str], seen: Seen, skipped: Callable[[str], object]
    ) -> None:
        self.names = {id(m): n for n, m in model.named_modules()}
        self.chosen, self.seen, self.skipped = chosen, seen, skipped
        self.running: list[_Running] = []
        self.counts: dict[str, int] = {}
        self.last: Tensor | None = None
        self.version = 0

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.running:
            self.running[-1].is_leaf = False
        inputs = [*args, *kwargs.values()]
        given = first_tensor(inputs)
        self.running.append(
            _Running(
                # A later layer, or this one, may write over it.
                None if given is None else given.detach().clone(),
                follows=given is not None
                and given is self.last
                and given._version == self.version,  # and nothing has written over it since
                alone=len(inputs) == 1 and inputs[0] is given,
            )
        )

    def after(self, module: nn.Module, _: Any, made: Any) -> None:
        run = self.running.pop()
        name = self.names[id(module)]
        if not (name in self.chosen if self.chosen else run.is_leaf):
            return
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        out = first_tensor(made)
        call = Call(name, number, module, run.follows, run.alone)
        self.last, self.version = out, 0 if out is None else out._version
        if run.given is None or out is None:
            what = "is given" if run.given is None else "returns"
            self.skipped(f"{call.label} left out: it {what} no floating-point tensor")
            return
        if made is not out:
            self.skipped(f"{call.label}: of several outputs the first is measured")
        self.seen(call, run.given, out.detach())


@contextmanager
def watched(
    model: nn.Module,
    seen: Seen,
    *,
    layers: Sequence[str] = (),
    skipped: Callable[[str], object] | None = None,
) -> Iterator[None]:
    """Tell ``seen`` of every layer that runs while the context is open.

    Args:
        model: the module to watch.
        seen: called as each layer ends; what it is given belongs to the model and may be written
            over as soon as it returns, so it must copy what it keeps.
        layers: names of the modules to watch; without, those inside which no other module runs.
        skipped: called with a line for what cannot be shown.

    Raises:
        LayerTraceError: the model has no module of such a name.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> with watched(net, lambda call, given, made: print(call.label, tuple(made.shape))):
        ...     _ = net(torch.ones(1, 3))
        0 (1, 2)
        1 (1, 2)
    """
    model = inside(model)
    names = [n for n, _ in model.named_modules()]
    for name in layers:
        if name not in names:
            raise LayerTraceError(f"the model has no module {name!r}{nearest(name, names[1:30])}")
    watch = _Watch(model, frozenset(layers), seen, skipped or _ignore)
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # compiled graphs run no hooks of modules inside them
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in model.named_modules():
            if "parametrizations" in name.split("."):
                continue  # runs when the weight is read: a part of the weight, not a layer
            for hook in (
                module.register_forward_pre_hook(watch.before, with_kwargs=True),
                module.register_forward_hook(watch.after),
            ):
                stack.callback(hook.remove)
        yield


@contextmanager
def as_in_use(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and afterwards every module and buffer back as it was."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
