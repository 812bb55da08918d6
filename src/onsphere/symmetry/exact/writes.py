"""Give tensors back what they held before a model ran."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from onsphere._torch.memory import key_of
from onsphere._torch.operations import OperationsMode
from onsphere.symmetry.exact.operation import written_by
from onsphere.symmetry.exact.overloads import overload_of


class WritesTakenBack(OperationsMode):  # type: ignore[no-untyped-call]
    """Gives tensors back what they held before a model ran: ``max_norm`` writes into its table.

    Args:
        tensors: those that no run may change.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._own = {key_of(t): t for t in tensors}
        self._before: list[tuple[Tensor, Tensor]] = []

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Keep a copy of what an operation is about to write into for the first time."""
        for key in written_by(overload_of(func), args, kwargs) & self._own.keys():
            own = self._own.pop(key)
            self._before.append((own, own.detach().clone()))
        return func(*args, **kwargs)

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        for tensor, before in self._before:
            tensor.detach().copy_(before)
