"""Why a norm cannot be folded: what its neighbours in the executed operations are."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from onsphere._torch.execution import bare_name, call, plain_execution, stand_ins
from onsphere._torch.operations import OperationsMode
from onsphere.symmetry.exact.overloads import short_name
from onsphere.symmetry.exact.writes import writes_taken_back

_MOVES = frozenset(
    (
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "permute",
        "transpose",
        "t",
        "expand",
        "clone",
        "contiguous",
        "alias",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "cat",
        "stack",
        "squeeze",
        "unsqueeze",
        "flatten",
        "_to_copy",
        "detach",
        "roll",
        "pixel_shuffle",
        "pixel_unshuffle",
        "as_strided",
        "lift_fresh",
        "unfold",
        "narrow",
        "repeat",
        "movedim",
    )
)
"""Operations that move numbers, and leave them what they are."""
_LINEAR = frozenset(
    (
        "convolution",
        "_convolution",
        "addmm",
        "mm",
        "bmm",
        "baddbmm",
        "linear",
        "matmul",
        "mv",
        "addmv",
        "dot",
        "_grouped_mm",
        "mkldnn_convolution",
    )
)
"""Operations that multiply by a matrix."""

Key = tuple[int, int]
"""A tensor, and how often it was written into."""


@dataclass(frozen=True, eq=False)
class _Node:
    name: str
    where: str
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]

    @property
    def moves(self) -> bool:
        """Whether it moves numbers, or multiplies all of them by one."""
        return self.name in _MOVES or (self.name in ("mul", "div", "neg") and len(self.inputs) == 1)

    @property
    def said(self) -> str:
        return f"{self.name!r} in {self.where!r}" if self.where else f"{self.name!r}"


class _Recorder(OperationsMode):  # type: ignore[no-untyped-call]
    """Writes down every operation with what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.where = ""
        self.nodes: list[_Node] = []
        self._kept: list[Tensor] = []
        self._version: defaultdict[int, int] = defaultdict(int)

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = tuple(self.key(t) for t in given)
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for t in made:
            if any(t is u for u in given):
                self._version[id(t)] += 1
        self._kept += [*given, *made]
        after = tuple(self.key(t) for t in made)
        self.nodes.append(_Node(short_name(func).rstrip("_"), self.where, before, after))
        return result

    def key(self, t: Tensor) -> Key:
        return (id(t), self._version[id(t)])


class Neighbours:
    """What reads and writes what in one run of a model.

    Args:
        model: the model.
        args: positional inputs.
        kwargs: keyword inputs.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._recorder = recorder = _Recorder()

        def enter(path: str) -> None:
            recorder.where = bare_name(path)

        own = stand_ins(model)
        taken_back = writes_taken_back(model.parameters())
        with plain_execution(), torch.no_grad(), taken_back, recorder:
            call(model, own, args, kwargs, enter)
        self._names = {(id(t), 0): bare_name(n) for n, t in own.items()}
        self._readers: defaultdict[Key, list[_Node]] = defaultdict(list)
        self._writer: dict[Key, _Node] = {}
        for node in recorder.nodes:
            for key in node.inputs:
                self._readers[key].append(node)
            for key in node.outputs:
                self._writer.setdefault(key, node)
            names = {self._names.get(k) for k in node.inputs}
            if node.name in _MOVES and len(names) == 1 and None not in names:
                self._names |= dict.fromkeys(node.outputs, names.pop() or "")
        self._uses: defaultdict[str, list[_Node]] = defaultdict(list)
        for node in recorder.nodes:
            for name in {self._names[k] for k in node.inputs if k in self._names}:
                if node.name not in _MOVES:
                    self._uses[name].append(node)

    def why_not_into_writer(self, path: str) -> str | None:
        """Return what keeps a norm from being folded into what writes its input."""
        own = [n for n in self._recorder.nodes if self._inside(n, path)]
        given = [(k, n) for n in own for k in n.inputs if self._from_outside(k, path)]
        if not given:
            return "it does not run on these inputs"
        return next(filter(None, (self._behind(k, n) for k, n in given)), None)

    def _behind(self, key: Key, reader: _Node) -> str | None:
        others = [n for n in self._readers[key] if n is not reader and n.name != "detach"]
        if others:
            return f"others read its input as well: {others[0].said}"
        writer = self._writer.get(key)
        if writer is None:
            return "its input is one of the model's inputs: no linear map writes it"
        if writer.moves:
            found = (self._behind(k, writer) for k in writer.inputs if k not in self._names)
            return next(filter(None, found), None)
        if writer.name not in _LINEAR:
            return f"{writer.said} writes its input, which is no linear map"
        return self._shared(writer, "writes its input")

    def why_not_into_readers(self, path: str) -> str | None:
        """Return what keeps a gain from being folded into what reads its output."""
        own = [n for n in self._recorder.nodes if self._inside(n, path)]
        if not own:
            return "it does not run on these inputs"
        made = [
            k for n in own for k in n.outputs
            if not any(self._inside(r, path) for r in self._readers[k])
        ]  # fmt: skip
        return next(filter(None, (self._before(k) for k in self._last_of(made))), None)

    def _last_of(self, made: Sequence[Key]) -> list[Key]:
        read = [k for k in made if self._readers[k]]
        return read or list(made[-1:])

    def _before(self, key: Key) -> str | None:
        readers = self._readers[key]
        if not readers:
            return "its output is the model's output, or nothing reads it"
        for node in readers:
            if node.moves:
                found = next(filter(None, (self._before(k) for k in self._seen(node))), None)
            elif node.name in _LINEAR:
                found = self._shared(node, "reads its output")
            else:
                found = f"{node.said} reads its output, and is no linear map"
            if found:
                return found
        return None

    def _seen(self, node: _Node) -> Iterator[Key]:
        yield from (k for k in node.outputs if self._readers[k])

    def _shared(self, node: _Node, does: str) -> str | None:
        for k in node.inputs:
            name = self._names.get(k)
            others = [n for n in self._uses[name] if n is not node] if name else []
            if others:
                return f"{name!r} {does} and is tied: {others[0].said} uses it as well"
        return None

    def _inside(self, node: _Node, path: str) -> bool:
        return node.where == path or node.where.startswith(f"{path}.")

    def _from_outside(self, key: Key, path: str) -> bool:
        writer = self._writer.get(key)
        return key not in self._names and (writer is None or not self._inside(writer, path))
