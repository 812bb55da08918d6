"""See every operation that a model executes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
