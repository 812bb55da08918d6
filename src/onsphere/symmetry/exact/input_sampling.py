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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
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
from onsphere.symmetry.exact.overloads import is_float

Runs = Callable[[tuple[Any, ...], Mapping[str, Any]], bool]
"""Whether a model takes some inputs."""

_MANY = 64
"""How large a large batch is."""
_MOST_ENTRIES = 2**16
"""How many numbers a large batch holds at most, if it is more than twice the one given."""
_DRAWS = 3
"""On how many redrawn whole numbers the model must run to be trusted to run on any."""
_TRIES = 12
"""How often they are drawn anew where it does not run on all of them (a row of padding alone)."""
_FEW = 3
"""Among how many rows are drawn that shall meet."""
_LONG = 16
"""From which length on less than half as many entries are tried first; of few, one may be left."""
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
        for numbers, size in self._lookups(name, op):
            leaf = self._leaf_of.get(key_of(numbers))
            if leaf is not None and size:
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
    _many: list[Any] | None = None

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
        for axis, _, size in self.resized:
            if axis == 0:
                largest = min(_MANY, _MOST_ENTRIES * size // max(entries, 1))
                for count in (largest, largest // 4, 2 * size):
                    tried = [self._resized(i, t, 0, size, count) for i, t in enumerate(leaves)]
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
        if (0, 1) in self._axes(self._given) and not any(a == 0 for a, _, _ in self.resized):
            said.append(
                "The inputs are a batch of one, and the model took no other: what holds for a "
                "batch of one only is not told from the rest."
            )
        if self._fixed:
            named = self._names()
            fixed = _listed([named[i] for i in sorted(self._fixed)])
            said.append(
                f"Whole-number inputs or masks that stayed as given ({fixed}): the model did not "
                "run on others of their kind."
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
        fresh = torch.randint(low, high + 1, t.shape, generator=self.generator)
        if i in self.rows and meet:
            few = fresh.flatten()[:_FEW]
            fresh = few[torch.randint(len(few), fresh.shape, generator=self.generator)]
        return torch.where(kept, t, fresh.to(t))

    def _mask(self, t: Tensor) -> Tensor:
        """Turn some entries over; of each row one entry stays as it is, the first in a table."""
        if t.numel() < 2:
            return t
        turned = torch.rand(t.shape, generator=self.generator) < _HIDDEN
        first = int(torch.randint(t.numel(), (), generator=self.generator)) if t.ndim == 1 else 0
        turned[..., first] = False
        return torch.where(turned.to(t.device), 1 - t.to(torch.int64), t.to(torch.int64)).to(t)

    def _find_fixed(self) -> None:
        """Leave alone what the model never runs on when it is redrawn."""
        whole = [
            i for i, t in enumerate(self._given)
            if _is_plain(t) and _is_mask(t)
        ]  # fmt: skip
        self._fixed = {i for i in whole if i not in self.rows and _are_places(self._given[i])}
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
        drawn_anew = any(_is_mask(t) for t in leaves if _is_plain(t))
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
        found = []
        for axis, size in self._axes(leaves):
            for other in [2, 3] if self.few and (axis, size) == (0, 1) else _sizes(size, axis):
                tried = [self._resized(i, t, axis, size, other) for i, t in enumerate(leaves)]
                if all(a is b for a, b in zip(tried, leaves, strict=True)):
                    break  # an earlier axis of the same length took it along
                if self._takes_some(tried):
                    leaves = tried
                    found.append((axis, size, other))
                    break
        self.resized = tuple(found)
        return leaves if found else None

    def _axes(self, leaves: Sequence[Any]) -> list[tuple[int, int]]:
        """Return axes and their lengths: the batch, the length, and what else there is."""
        tensors = [t for t in leaves if _is_plain(t)]
        pairs = chain.from_iterable(enumerate(t.shape) for t in tensors)
        return [(a, n) for a, n in dict.fromkeys(pairs) if n]

    def _resized(self, i: int, t: Any, axis: int, size: int, other: int) -> Any:
        """Return the i-th input with another length of an axis, made of what was there."""
        if not _is_plain(t):
            return t
        # A square mask over the length has it along several axes.
        square = t.ndim == 2 and _is_mask(t) and i not in self.rows
        first = axis - 1 if axis and square else axis
        along = [a for a in range(first, t.ndim) if t.shape[a] == size] if axis else [0]
        if axis >= t.ndim or t.shape[axis] != size:
            return t
        ordered = _are_places(t)
        for a in along:
            more = torch.randint(0, size, (max(other - size, 0),), generator=self.generator)
            index = torch.cat([torch.arange(min(size, other)), more])
            t = t.index_select(a, index.to(t.device))
        return t.sort().values if ordered else t

    def _takes(self, leaves: Sequence[Any]) -> bool:
        try:
            return self.runs(*self._packed(leaves))
        except ModelError:
            return False

    def _packed(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tree_unflatten(list(leaves), self._structure)
        return args, kwargs


def _sizes(size: int, axis: int) -> list[int]:
    """Return other lengths to try; three for a single one.

    Along the batch one more comes first, and of a large batch about half. A length changes by so
    much that every stride moves on: to twice as many, or, of many and of pixels, to less than half,
    which costs less; where that is too few, one patch was given, and twice as many make two. It is
    odd where the model takes that, so that what patches or windows do not divide is padded.
    """
    if size == 1:
        return [3]
    half, twice = size // 2, 2 * size
    above = half + half % 2 + 1
    if axis == 0:
        first = [above] if size >= _MANY // 2 else []
    elif size >= _LONG:
        first = [half - 1 + half % 2, half, twice + 1, twice, above]
    else:
        first = [twice + 1, twice, half]
    sizes = [*first, size + 1, size - 1, half]
    return list(dict.fromkeys(n for n in sizes if 1 < n != size))


def _place(path: Sequence[Any]) -> str:
    """Say where an input stands: ``mask``, or ``args[1]`` of a positional one."""
    (among, first, *inside) = path
    start = f"args{first}" if among.idx == 0 else str(first.key)
    return start + "".join(map(str, inside))


def _are_places(t: Tensor) -> bool:
    """Return whether whole numbers say where pieces begin: in one row, rising from 0."""
    if t.ndim != 1 or t.numel() < 2 or t.dtype == torch.bool or t.is_meta:
        return False
    return bool((t[0] == 0) & (t.diff() >= 0).all() & (t[-1] > 0))


def _listed(flags: Sequence[Any]) -> str:
    return ", ".join(map(str, flags[:3])) + (", ..." if len(flags) > 3 else "")


def _is_plain(t: Any) -> TypeGuard[Tensor]:
    return isinstance(t, Tensor) and t.layout is torch.strided


def _is_mask(t: Tensor) -> bool:
    return not is_float(t) or _is_infinite_mask(t)


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
