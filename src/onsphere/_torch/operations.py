"""See every operation that a model executes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OperationsMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation that a model executes, wherever gradients are recorded or not.

    Under :func:`torch.inference_mode` PyTorch hands over composite operations, such as a linear
    layer or a LayerNorm, as they are called. Here they are taken apart there as anywhere else.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while a model is followed, so nothing is to be skipped

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operation, and return its result."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.operate(func, args, kwargs)


class WritesTakenBack(OperationsMode):  # type: ignore[no-untyped-call]
    """Gives tensors back what they held before a model ran: ``max_norm`` writes into its table.

    Args:
        tensors: those that no run may change.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._own = {t.untyped_storage()._cdata: t for t in tensors if t.layout is torch.strided}
        self._before: list[tuple[Tensor, Tensor]] = []

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Keep a copy of what an operation is about to write into for the first time."""
        if func._schema.is_mutable:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value.layout is torch.strided:
                    own = self._own.pop(value.untyped_storage()._cdata, None)
                    if own is not None:
                        self._before.append((own, own.detach().clone()))
        return func(*args, **kwargs)

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        for tensor, before in self._before:
            tensor.detach().copy_(before)
