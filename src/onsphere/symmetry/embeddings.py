"""Which weights look up embeddings, and which make the output: those kept off spheres by default.

Both are found in the graph of one forward pass, whatever the modules are called. Embeddings are the
tables that a lookup reads. The head of an output is the first matrix that is met on the way back
from it, if everything passes through that matrix. The last block beside a residual connection is
no head, since the output also sees what went past it; such a model has none.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from onsphere._torch.execution import ModelError, bare_name, call, float_outputs, plain_execution
from onsphere._torch.materialize import unwrapped
from onsphere.symmetry.exact.writes import writes_taken_back
from onsphere.symmetry.result import Inputs

_LOOKUPS = ("EmbeddingBackward", "EmbeddingBagBackward")


def embeddings_and_heads(model: nn.Module, inputs: Inputs | None = None) -> set[str]:
    """Return the names of embedding tables, and of the weights of the output layer.

    Args:
        model: any module.
        inputs: what to run it on. Without inputs, or when it does not run on them (a model
            without memory, on another device), only what modules declare is known.

    Returns:
        Names of parameters, tied ones once.

    Example:
        >>> from onsphere.symmetry.result import Inputs
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 9))
        >>> sorted(embeddings_and_heads(net, Inputs((torch.tensor([1, 2]),), {}, None)))
        ['0.weight', '3.bias', '3.weight']
    """
    inner = unwrapped(model)
    names = {p: bare_name(n) for n, p in inner.named_parameters()}
    found = {names[p] for p in _declared(inner) if p in names}
    if inputs is not None and not any(p.is_meta for p in names):
        with suppress(ModelError):
            found |= _seen(inner, inputs)
    return found


def _declared(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield from module.parameters(recurse=False)
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, getter, None)
        try:
            part = get() if callable(get) else None
        except (NotImplementedError, AttributeError):
            part = None
        if isinstance(part, nn.Module):
            yield from part.parameters()


def _seen(model: nn.Module, inputs: Inputs) -> set[str]:
    """Run the model once, on copies of its buffers, and read its graph."""
    state: dict[str, Tensor] = {n: b.clone() for n, b in model.named_buffers()}
    held = {
        n: p.detach().requires_grad_(p.is_floating_point()) for n, p in model.named_parameters()
    }
    args, kwargs = tree_map(_watched, (inputs.args, dict(inputs.kwargs)))
    with plain_execution(), torch.enable_grad(), writes_taken_back(model.parameters()):
        result = call(model, {**state, **held}, args, kwargs)
        outputs = [t for t in float_outputs(result, inputs.output) if t.grad_fn is not None]
    graph = _Graph(outputs, {id(t): bare_name(n) for n, t in held.items()})
    return graph.tables() | graph.heads()


def _watched(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


class _Graph:
    """The graph behind some outputs; an edge runs from a result to what it was made of."""

    def __init__(self, outputs: list[Tensor], names: Mapping[int, str]) -> None:
        self.starts = [t.grad_fn for t in outputs]
        self.names = names
        self.shapes: dict[str, int] = {}
        self.order = self._sorted()
        self.from_data = self._from_data()

    def tables(self) -> set[str]:
        """Return the weights that lookups read."""
        lookups = [n for n in self.order if n.name().startswith(_LOOKUPS)]
        return {w for n in lookups for w in self._weights(n)}

    def heads(self) -> set[str]:
        """Return the weights of the first matrix behind each output that all of it passes."""
        return {w for start in self.starts for w in self._head(start)}

    def _head(self, start: Any) -> set[str]:
        open_ends = {start} & self.from_data
        for node in self.order:
            if node not in open_ends:
                continue
            weights = self._weights(node)
            if any(self.shapes[w] > 1 for w in weights):
                return weights if len(open_ends) == 1 else set()
            open_ends.remove(node)
            open_ends |= {n for n in _behind(node) if n in self.from_data}
        return set()

    def _sorted(self) -> list[Any]:
        """Order the nodes so that each comes before what it was made of."""
        done: dict[Any, None] = {}
        stack = [(n, False) for n in self.starts]
        entered = set()
        while stack:
            node, left = stack.pop()
            if left:
                done[node] = None
            elif node not in entered:
                entered.add(node)
                stack.append((node, True))
                stack += [(n, False) for n in _behind(node)]
        return list(reversed(done))

    def _from_data(self) -> set[Any]:
        """Return the nodes that depend on an input, and not on weights alone."""
        found = set()
        for node in reversed(self.order):
            leaf = getattr(node, "variable", None)
            is_input = leaf is not None and id(leaf) not in self.names
            looks_up = node.name().startswith(_LOOKUPS)
            if is_input or looks_up or any(n in found for n in _behind(node)):
                found.add(node)
        return found

    def _weights(self, node: Any) -> set[str]:
        """Return the weights that enter a node, as they are or through a parametrization."""
        found: set[str] = set()
        looks_up = node.name().startswith(_LOOKUPS)
        stack = [n for n in _behind(node) if looks_up or n not in self.from_data]
        while stack:
            behind = stack.pop()
            leaf = getattr(behind, "variable", None)
            if leaf is not None and id(leaf) in self.names:
                found.add(self.names[id(leaf)])
                self.shapes[self.names[id(leaf)]] = leaf.ndim
            stack += _behind(behind)
        return found


def _behind(node: Any) -> list[Any]:
    return [n for n, _ in node.next_functions if n is not None]
