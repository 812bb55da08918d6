"""The monitor in a Hugging Face ``Trainer``."""

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.optimizer import Optimizer

from onsphere.monitor import Monitor

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["monitor_callback"]


class Watch:
    """What the callback does; :func:`monitor_callback` makes a ``TrainerCallback`` of it.

    Attributes:
        monitor: of the present or last training; ``None`` before the first.
    """

    monitor: Monitor | None = None

    def __init__(self, spheres: Any, **options: Any) -> None:
        self._spheres, self._options = spheres, options

    def on_train_begin(
        self,
        args: Any,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Start watching, from the step of the checkpoint if there is one."""
        if self.monitor is not None:
            self.monitor.close()
        start = int(state.global_step)
        self.monitor = Monitor(model, optimizer, self._spheres, start=start, **self._options)

    def on_log(
        self,
        args: Any,  # noqa: ARG002
        state: Any,  # noqa: ARG002
        control: Any,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the newest metrics that are here to what is logged."""
        if self.monitor is not None and logs is not None:
            logs.update(self.monitor.latest(wait=False))

    def on_train_end(
        self,
        args: Any,  # noqa: ARG002
        state: Any,  # noqa: ARG002
        control: Any,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Stop watching, and write what is left."""
        if self.monitor is not None:
            self.monitor.close()


def monitor_callback(spheres: Any, **options: Any) -> "TrainerCallback":
    """Return a callback that watches the training of a Hugging Face ``Trainer``.

    ``Trainer(..., callbacks=[monitor_callback(audit, path="run.jsonl")])``. Its ``monitor`` is the
    :class:`~onsphere.Monitor`. At every logging event the metrics join the ``logs`` that callbacks
    *after* this one see. The reporters of ``report_to`` come before it, unless you move it:
    ``callbacks = trainer.callback_handler.callbacks; callbacks.insert(0, callbacks.pop())``.

    Args:
        spheres: an audit, or what else :class:`~onsphere.Monitor` takes.
        options: for the monitor: ``every``, ``path``, ``writer``, ``thresholds``.

    Returns:
        The callback.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "transformers is not installed, and this callback is for its Trainer: "
            "pip install transformers"
        ) from error
    return type("MonitorCallback", (Watch, TrainerCallback), {})(spheres, **options)
