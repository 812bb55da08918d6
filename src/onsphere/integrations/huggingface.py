"""The monitor in a Hugging Face ``Trainer``."""

from inspect import currentframe
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.optimizer import Optimizer

from onsphere.monitor import Monitor
from onsphere.monitor.monitor import By

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["monitor_callback"]


_RESULTS = ("eval_", "test_", "train_")
"""How the names of what is logged begin after an evaluation, or at the end of a training."""


class Watch:
    """What the callback does; :func:`monitor_callback` makes a ``TrainerCallback`` of it.

    Attributes:
        monitor: of the present or last training; ``None`` before the first.
    """

    monitor: Monitor | None = None

    def __init__(self, spheres: Any, *, by: By = "kind", **options: Any) -> None:
        self._spheres, self._options, self._by = spheres, options, by

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
        _put_first(self, currentframe())
        if self.monitor is not None:
            self.monitor.close()
        options = {"start": int(state.global_step) or None, **self._options}
        self.monitor = Monitor(model, optimizer, self._spheres, **options)

    def on_log(
        self,
        args: Any,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the newest metrics that are here to what is logged, and to the history."""
        if self.monitor is None or logs is None or any(k.startswith(_RESULTS) for k in logs):
            return
        found = self.monitor.latest(wait=False, by=self._by)
        logs.update(found)
        history = getattr(state, "log_history", None)
        if history and history[-1].get("step") == state.global_step:
            history[-1].update(found)

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


def _put_first(callback: Watch, frame: FrameType | None) -> None:
    """Put a callback before the reporters, which log what has been added when their turn comes.

    A trainer does not hand itself to its callbacks. Its handler, which holds the list of them, is
    what calls this one, so it is found there; where something else calls, nothing is moved.
    """
    caller = None if frame is None else frame.f_back
    handler = None if caller is None else caller.f_locals.get("self")
    callbacks = getattr(handler, "callbacks", None)
    if isinstance(callbacks, list) and callback in callbacks:
        callbacks.remove(callback)
        callbacks.insert(0, callback)


def monitor_callback(spheres: Any, *, by: By = "kind", **options: Any) -> "TrainerCallback":
    """Return a callback that watches the training of a Hugging Face ``Trainer``.

    ``Trainer(..., callbacks=[monitor_callback(audit, path="run.jsonl")])``. Its ``monitor`` is the
    :class:`~onsphere.Monitor`. Whenever the trainer logs a loss, the metrics are in what its
    reporters (``report_to``) get, and in ``trainer.state.log_history``.

    Args:
        spheres: an audit, or what else :class:`~onsphere.Monitor` takes.
        by: what is logged: the mean over layers of one ``"kind"``
            (``onsphere/norm/model.layers.all.mlp.up_proj.weight``), or each ``"layer"``.
        options: for the monitor: ``every``, ``path``, ``writer``, ``thresholds``, and ``start``, by
            default the step of the checkpoint. A training that starts anew needs a ``path`` of its
            own; ``start=0`` replaces what the file holds.

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
    return type("MonitorCallback", (Watch, TrainerCallback), {})(spheres, by=by, **options)
