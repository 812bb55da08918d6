"""Give tensors back what they held before a model ran."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from onsphere._torch.memory import key_of
from onsphere._torch.operations import OperationsMode
from onsphere._torch.saved import Place, SavedMemory, outgrows, places_of, put_back
from onsphere.symmetry.exact.operation import written_by
from onsphere.symmetry.exact.overloads import Overload, flat_tensors, overload_of


class OwnMemory:
    """Memory that a run may write into, of which is saved what it held.

    Args:
        tensors: those that no run may change.
        all_else: whether it may change nothing else either that was there before it.
    """

    def __init__(self, tensors: Iterable[Tensor], all_else: bool = False) -> None:
        self._own = {key_of(t): t.detach() for t in tensors}  # held, so that the keys last
        self._all_else = all_else
        self._made: set[int] = set()
        self._saved = SavedMemory()
        self._places: list[Place] = []

    def before(self, overload: Overload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Save what an operation is about to write into."""
        for t in written_by(overload, args, kwargs):
            key = key_of(t)
            if key not in self._own and (not self._all_else or key in self._made):
                continue
            if key not in self._saved:
                self._places.append(Place(t))
            self._saved.save(t)
            if overload.name == "aten::resize_" and outgrows(*args[:2]):
                t.data = t.clone()

    def after(self, overload: Overload, args: Sequence[Any], result: Any) -> None:
        """Note what an operation has made: it goes with the run."""
        if self._all_else:
            there = set() if overload.functional else set(map(key_of, flat_tensors(args)))
            self._made.update(k for k in map(key_of, flat_tensors(result)) if k not in there)

    def put_back(self) -> None:
        """Give memory back what it held, and tensors their memory."""
        self._saved.put_back()
        put_back(self._places)


@contextmanager
def writes_taken_back(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors back what they held before a model ran: ``max_norm`` writes into its table.

    So it does with all else that is there before and that the model writes into.

    Args:
        tensors: those that no run may change.
    """
    tensors = list(tensors)
    places, memory = places_of(tensors), OwnMemory(tensors, all_else=True)
    try:
        with _Saving(memory):
            yield
    finally:
        memory.put_back()
        put_back(places)


class _Saving(OperationsMode):  # type: ignore[no-untyped-call]
    """Saves what operations are about to write into some memory."""

    def __init__(self, memory: OwnMemory) -> None:
        super().__init__()
        self._memory = memory

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operation, after what it writes into is saved."""
        overload = overload_of(func)
        if overload.writes:
            self._memory.before(overload, args, kwargs)
        result = func(*args, **kwargs)
        self._memory.after(overload, args, result)
        return result
