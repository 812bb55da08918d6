"""Other inputs of the same kinds as those given: a claim must not hold for the given ones only.

Dummy inputs hide what a model does: equal token ids make all scores equal, a single token makes
attention an identity, a batch of one makes a mean over the batch vanish, a mask of ones hides what
it masks. So certificates look at redrawn inputs, and at inputs of other lengths where the model
takes them. Each tensor keeps its kind:

- floating-point inputs are moved at random; where they hold infinities they are masks;
- whole numbers that look up rows of a table, or name a class, are drawn among these;
- masks of 0 and 1, or of 0 and minus infinity, hide some entries, never a whole row;
- lengths, the largest of which is the length of an axis, are drawn between 1 and that length;
- other whole numbers are drawn between the smallest and the largest one given, from 0 where all are
  equal, and negative ones, which mark what is left out, stay.

What the model does not run on is not used.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import (
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

from onsphere._torch.execution import ModelError
from onsphere._torch.memory import key_of
from onsphere.symmetry.exact.operation import Operation, Origin
from onsphere.symmetry.exact.other_lengths import MANY, Way, are_places, axes, resized, sizes, ways
from onsphere.symmetry.exact.overloads import is_float

Runs = Callable[[tuple[Any, ...], Mapping[str, Any]], bool]
"""Whether a model takes some inputs."""

_MOST_ENTRIES = 2**16
"""How many numbers a large batch holds at most, if it is more than twice the one given."""
_DRAWS = 3
"""On how many redrawn whole numbers the model must run to be trusted to run on any."""
_TRIES = 12
"""How often they are drawn anew where it does not run on all of them (a row of padding alone)."""
_ELSE = 3
"""How many lengths are tried of axes that may be meant instead of those of the same number."""
_FEW = 3
"""Among how many rows are drawn that shall meet."""
_HIDDEN = 0.25
"""Share of a mask that is hidden."""

_LOOKUPS = {
    "embedding": ("weight", "indices", 0),
    "_embedding_bag": ("weight", "indices", 0),
    "_embedding_bag_forward_only": ("weight", "indices", 0),
    "nll_loss_forward": ("self", "target", 1),
    "nll_loss2d_forward": ("self", "target", 1),
    "index_select": ("self", "index", None),
    "gather": ("self", "index", None),
    "scatter": ("self", "index", None),
    "scatter_add": ("self", "index", None),
    "index_add": ("self", "index", None),
    "index_copy": ("self", "index", None),
}
"""Operation -> what it looks up, the whole numbers that say where, and along which axis."""


_CHANGED = {"repeat_interleave", "abs", "neg", "negative"}
"""Operations that give other numbers than those they rearrange."""


class InputUse:
    """Watches what the whole numbers among the inputs look up.

    Args:
        inputs: the inputs, any nesting of containers.
    """

    def __init__(self, inputs: Any) -> None:
        self.rows: dict[int, int] = {}
        self._leaf_of: dict[int, int] = {}
        self._read: tuple[int, Any] | None = None
        for i, t in enumerate(tree_leaves(inputs)):
            if _is_plain(t) and not is_float(t):
                self._leaf_of[key_of(t)] = i

    def follow(self, op: Operation, rearranges: bool) -> None:
        """Follow the numbers through an operation that keeps them, or note what they look up."""
        if not self._leaf_of:
            return
        name = op.name.removeprefix("aten::").rstrip("_")
        first = op.first if isinstance(op.first, Tensor) else None
        leaf = None if first is None or first.numel() == 0 else self._leaf_of.get(key_of(first))
        if leaf is not None and name not in _CHANGED and (rearranges or name == "_to_copy"):
            for result in tree_leaves(op.result):
                if isinstance(result, Tensor):
                    self._leaf_of.setdefault(key_of(result), leaf)
        # `table[k]` of a tensor without axes reads a number, and takes that row.
        if name == "select" and self._read is not None and op["index"] == self._read[1]:
            self._note(self._read[0], op["self"].shape[op["dim"]])
        self._read = None
        if name == "_local_scalar_dense" and leaf is not None:
            self._read = leaf, op.result
        for numbers, size in self._lookups(name, op):
            leaf = self._leaf_of.get(key_of(numbers))
            if leaf is not None and size:
                self._note(leaf, size)

    def _note(self, leaf: int, size: int) -> None:
        self.rows[leaf] = min(size, self.rows.get(leaf, size))

    def _lookups(self, name: str, op: Operation) -> list[tuple[Tensor, int]]:
        """Return the whole numbers that an operation looks up, and in how many rows."""
        if name in ("index", "index_put", "_index_put_impl"):
            table = op["self"]
            pairs = zip(op["indices"], table.shape, strict=False)
            return [(t, n) for t, n in pairs if t is not None and t.dtype != torch.bool]
        if name not in _LOOKUPS:
            return []
        of, numbers, axis = _LOOKUPS[name]
        table = op[of]
        axis = op["dim"] if axis is None else min(axis, table.ndim - 1)
        return [(op[numbers], table.shape[axis])] if table.ndim else []


def marked(inputs: Any, mark: Callable[[Tensor, Origin], None]) -> None:
    """Tell of every input whether it is data or a mask."""
    for t in tree_leaves(inputs):
        if isinstance(t, Tensor):
            mask = not is_float(t) or (not t.is_meta and not _is_finite(t))
            mark(t, Origin.WHOLE if mask else Origin.DATA)


@dataclass
class OtherInputs:
    """Draws inputs of the same kinds as those given, of the given shapes and of others.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        rows: input -> how many rows the table has that it looks up.
        runs: whether the model takes some inputs.
        generator: of everything random here.
        few: whether a batch of one becomes one of two instead of three, which takes less time.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: Mapping[int, int]
    runs: Runs
    generator: torch.Generator
    few: bool = False
    resized: tuple[tuple[int, int, int], ...] = ()
    _fixed: set[int] = field(default_factory=set)
    _picky: bool = False
    _shapes: list[list[Any]] = field(default_factory=list)
    _changed: list[tuple[Way, int, int]] = field(default_factory=list)
    _many: list[Any] | None = None
    _row: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._given, self._structure = tree_flatten((tuple(self.args), dict(self.kwargs)))
        self._find_fixed()
        other = self._other_shapes()
        self._shapes = [self._given] if other is None else [other, self._given]

    def draw(
        self, turn: int, move: Callable[[Tensor], Tensor], meet: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Draw inputs.

        Args:
            turn: shapes take turns: other ones first, where the model takes any.
            move: moves floating-point numbers at random.
            meet: numbers that look up rows are drawn among few, so that the same one comes up
                several times: edges that end in one node, words that return.
        """
        return self._packed(self._taken(self._shapes[turn % len(self._shapes)], move, meet))

    def many(self, move: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Draw a large batch, where the model takes any other batch than the one given."""
        if self._many is None:
            self._many = self._large_batch()
        return self._packed(self._taken(self._many, move))

    def _large_batch(self) -> list[Any]:
        leaves = self._shapes[0]
        entries = sum(t.numel() for t in leaves if isinstance(t, Tensor))
        for way, _, size in self._changed:
            if all(axis == 0 for _, axis in way):
                largest = min(MANY, _MOST_ENTRIES * size // max(entries, 1))
                for count in (largest, largest // 4, 2 * size):
                    tried = self._resized(leaves, way, size, count)
                    if count > size and self._takes_some(tried):
                        return tried
        return leaves

    @property
    def share(self) -> float:
        """How many numbers the other shapes hold, for one that the given ones hold; at most 1."""
        sizes = [sum(t.numel() for t in x if isinstance(t, Tensor)) for x in self._shapes]
        return min(1.0, sizes[0] / max(sizes[-1], 1))

    @property
    def turns(self) -> int:
        """How many shapes there are."""
        return len(self._shapes)

    def words(self) -> list[str]:
        """Say what was assumed of the inputs."""
        said = []
        if self.resized:
            changed = ", ".join(f"{n} -> {m} along axis {a}" for a, n, m in self.resized)
            said.append(
                f"Tried on inputs of other lengths too, made of those given ({changed}); what is "
                "claimed holds there as well."
            )
        others = {axis for axis, _, _ in self.resized}
        said += of_one(self._given, others, ", and the model took no other")
        if self._fixed:
            named = self._names()
            fixed = _listed([named[i] for i in sorted(self._fixed)])
            said.append(
                f"Whole-number inputs or masks that stayed as given ({fixed}): the model did not "
                "run on others of their kind."
            )
        single = [
            i for i, t in _plain(self._given).items()
            if not t.ndim and not is_float(t) and t.dtype != torch.bool
            and i not in self._fixed and i not in self.rows
        ]  # fmt: skip
        if single:
            named = self._names()
            said.append(
                f"Whole numbers without axes ({_listed([named[i] for i in single])}) were drawn "
                "between 0 and the one given, or 1: what others would run was not looked at."
            )
        flags = [x for x in self._given if isinstance(x, bool | int | float)]
        if flags:
            said.append(
                f"Python numbers and flags among the inputs ({_listed(flags)}) stayed as given: "
                "what other values would run was not looked at."
            )
        return said

    def _names(self) -> list[str]:
        """Name every input: by its key, or by its place among the positional ones."""
        paths, _ = tree_flatten_with_path((tuple(self.args), dict(self.kwargs)))
        return [_place(path) for path, _ in paths]

    def _redrawn(
        self, leaves: Sequence[Any], move: Callable[[Tensor], Tensor], meet: bool = False
    ) -> list[Any]:
        grown = self._lengths(leaves)
        drawn = []
        for i, t in enumerate(leaves):
            if _is_plain(t) and t.numel():
                # Numbers of 0 and 1 may be a mask or data.
                if not _is_mask(t) and not (_is_binary(t) and self._tosses()):
                    t = move(t)
                elif i not in self._fixed:
                    t = self._whole(i, t, grown, meet)
            drawn.append(t)
        return drawn

    def _tosses(self) -> bool:
        """Toss a coin."""
        return bool(torch.rand((), generator=self.generator) < 0.5)

    def _taken(
        self, leaves: Sequence[Any], move: Callable[[Tensor], Tensor], meet: bool = False
    ) -> list[Any]:
        """Draw inputs that the model takes."""
        drawn = self._redrawn(leaves, move, meet)
        if not self._picky or self._takes(drawn):
            return drawn
        for _ in range(_TRIES):
            drawn = self._redrawn(leaves, _same, meet)
            if self._takes(drawn):
                pairs = zip(drawn, self._redrawn(leaves, move, meet), strict=True)
                return [
                    moved if isinstance(t, Tensor) and not _is_mask(t) else t for t, moved in pairs
                ]
        return [move(t) if isinstance(t, Tensor) and not _is_mask(t) else t for t in leaves]

    def _lengths(self, leaves: Sequence[Any]) -> dict[int, int]:
        """Return for every length of an axis behind the batch what it is in these inputs."""
        pairs = [
            pair
            for a, b in zip(self._given, leaves, strict=True)
            if isinstance(a, Tensor) and a.ndim > 1
            for pair in zip(a.shape[1:], b.shape[1:], strict=True)
        ]
        return dict(pairs)

    def _whole(self, i: int, t: Tensor, lengths: Mapping[int, int], meet: bool) -> Tensor:
        """Draw whole numbers, or a mask, in the place of ``t``."""
        if is_float(t):
            if _is_binary(t):
                return self._mask(t)
            hidden = self._mask(t != 0)
            return torch.zeros_like(t).masked_fill(hidden, -math.inf)
        low, high = (int(x) for x in t.aminmax()) if t.dtype != torch.bool else (0, 1)
        kept = t < 0 if t.dtype != torch.bool else torch.zeros_like(t)
        if i in self.rows:
            low, high = 0, self.rows[i] - 1
        elif t.ndim == 1 and low >= 1 and high in lengths:
            low, high = 1, lengths[high]
        elif low >= 0 and high <= 1:
            return self._mask(t)
        else:
            low = max(low, 0) if low < high else 0
        if low >= high:
            return t
        if i in self.rows and not t.ndim:  # one row after the other: each may run something else
            self._row[i] = (self._row.get(i, int(t)) + 1) % self.rows[i]
            return torch.full_like(t, self._row[i])
        fresh = torch.randint(low, high + 1, t.shape, generator=self.generator)
        if i in self.rows and meet:
            few = fresh.flatten()[:_FEW]
            fresh = few[torch.randint(len(few), fresh.shape, generator=self.generator)]
        return torch.where(kept, t, fresh.to(t))

    def _mask(self, t: Tensor) -> Tensor:
        """Turn some entries over; of each row one entry stays as it is.

        That is mostly the first, as of sequences that are padded at their end, or another of the
        same value. A row is a whole axis: the last one that has several entries. A single flag
        turns over or not.
        """
        if t.numel() < 2:
            return torch.where(torch.tensor(self._tosses(), device=t.device), _turned(t), t)
        turned = torch.rand(t.shape, generator=self.generator) < _HIDDEN
        row = max(a for a, n in enumerate(t.shape) if n > 1)
        same = (t == t.narrow(row, 0, 1)).cpu() if t.ndim > 1 else 1.0
        likely = torch.rand(t.shape, generator=self.generator) * same
        if t.ndim > 1 and self._tosses():
            likely.narrow(row, 0, 1).fill_(2)
        turned.scatter_(row, likely.argmax(row, keepdim=True), False)
        return torch.where(turned.to(t.device), _turned(t), t)

    def _find_fixed(self) -> None:
        """Leave alone what the model never runs on when it is redrawn."""
        whole = [i for i, t in _plain(self._given).items() if _is_mask(t)]
        self._fixed = {i for i in whole if i not in self.rows and are_places(self._given[i])}
        free = [i for i in whole if i not in self._fixed]
        if not free or self._takes_redrawn():
            return
        self._fixed, self._picky = set(whole), True
        for i in free:
            self._fixed.discard(i)
            if not self._takes_some(self._given):
                self._fixed.add(i)

    def _takes_redrawn(self) -> bool:
        """Return whether the model runs on a few draws, all of them."""
        return all(self._takes(self._redrawn(self._given, _same)) for _ in range(_DRAWS))

    def _takes_some(self, leaves: Sequence[Any]) -> bool:
        """Return whether the model runs on inputs of these shapes, on some draw at least.

        Draws on which it gives no numbers (a row of padding alone) are made anew.
        """
        drawn_anew = any(_is_mask(t) for t in _plain(leaves).values())
        for attempt in range(_TRIES if drawn_anew else 1):
            try:
                if self.runs(*self._packed(self._redrawn(leaves, _same))):
                    self._picky |= attempt > 0
                    return True
            except ModelError:
                if not self._picky:
                    return False
        return False

    def _other_shapes(self) -> list[Any] | None:
        """Return the inputs with other lengths along every axis where the model takes them."""
        leaves: list[Any] = list(self._given)
        for axis, size in axes(_plain(leaves)):
            grown = self._with_other_length(leaves, axis, size)
            if grown is not None:
                leaves, (way, other) = grown
                self._changed.append((way, size, other))
                self.resized = (*self.resized, (axis, size, other))
        return leaves if self._changed else None

    def _with_other_length(
        self, leaves: Sequence[Any], axis: int, size: int
    ) -> tuple[list[Any], tuple[Way, int]] | None:
        """Return the inputs with another length of an axis, where the model takes one."""
        tensors = _plain(leaves)
        pairs = [
            i for i, t in tensors.items() if t.ndim == 2 and _is_mask(t) and i not in self.rows
        ]
        lengths = [2, 3] if self.few and (axis, size) == (0, 1) else sizes(size, axis)
        for attempt, way in enumerate(ways(tensors, axis, size, pairs)):
            for other in lengths[: (1 if self.few else _ELSE) if attempt else None]:
                tried = self._resized(leaves, way, size, other)
                if self._takes_some(tried):
                    return tried, (way, other)
        return None

    def _resized(self, leaves: Sequence[Any], way: Way, size: int, other: int) -> list[Any]:
        """Return the inputs with another length of the axes of some of them."""
        along = {i: [a for j, a in way if j == i] for i, _ in way}
        return [
            resized(t, along[i], size, other, self.generator) if i in along else t
            for i, t in enumerate(leaves)
        ]

    def _takes(self, leaves: Sequence[Any]) -> bool:
        try:
            return self.runs(*self._packed(leaves))
        except ModelError:
            return False

    def _packed(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tree_unflatten(list(leaves), self._structure)
        return args, kwargs


def _place(path: Sequence[Any]) -> str:
    """Say where an input stands: ``mask``, or ``args[1]`` of a positional one."""
    (among, first, *inside) = path
    start = f"args{first}" if among.idx == 0 else str(first.key)
    return start + "".join(map(str, inside))


def _listed(flags: Sequence[Any]) -> str:
    return ", ".join(map(str, flags[:3])) + (", ..." if len(flags) > 3 else "")


def _plain(leaves: Sequence[Any]) -> dict[int, Tensor]:
    """Return the tensors among inputs by their numbers."""
    return {i: t for i, t in enumerate(leaves) if _is_plain(t)}


def _is_plain(t: Any) -> TypeGuard[Tensor]:
    return isinstance(t, Tensor) and t.layout is torch.strided


def _is_mask(t: Tensor) -> bool:
    return not is_float(t) or _is_infinite_mask(t)


def of_one(inputs: Any, others: Collection[int], why: str) -> list[str]:
    """Say of inputs that are a batch of one, or hold one token or step, what that hides.

    Args:
        inputs: any nesting of containers.
        others: axes along which other lengths were tried.
        why: why none was along the rest.
    """
    tensors = _plain(tree_leaves(inputs)).values()
    said = []
    if any(t.shape[:1] == (1,) for t in tensors) and 0 not in others:
        said.append(
            f"The inputs are a batch of one{why}: what holds for a batch of one only is not told "
            "from the rest."
        )
    numbers = [t for t in tensors if not is_float(t) and t.dtype != torch.bool]
    tokens = [t for t in tensors if t.ndim == 3] + [t for t in numbers if t.ndim == 2]
    if any(t.shape[1] == 1 for t in tokens) and 1 not in others:
        said.append(
            f"An input has one entry along axis 1{why}: what holds for one only is not told from "
            "the rest."
        )
    return said


def _turned(t: Tensor) -> Tensor:
    """Return a mask with all entries turned over."""
    return (1 - t.to(torch.int64)).to(t)


def _is_infinite_mask(t: Tensor) -> bool:
    """Return whether a floating-point tensor holds 0 and minus infinity, and nothing else."""
    if not t.is_floating_point() or t.is_meta or not t.numel():
        return False
    hidden = t == -math.inf
    return bool(hidden.any()) and bool((hidden | (t == 0)).all())


def _is_binary(t: Tensor) -> bool:
    """Return whether a floating-point tensor holds 0 and 1, and nothing else."""
    if not t.is_floating_point() or t.is_meta or not t.numel():
        return False
    return bool(((t == 0) | (t == 1)).all())


def _is_finite(t: Tensor) -> bool:
    return t.layout is not torch.strided or bool(t.isfinite().all())


def _same(t: Tensor) -> Tensor:
    return t
