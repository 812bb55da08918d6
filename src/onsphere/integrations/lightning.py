"""The monitor in Lightning's ``Trainer``."""

from importlib import import_module
from typing import Any

from torch import nn

from onsphere.monitor import Monitor
from onsphere.monitor.monitor import By

_HOMES = ("lightning.pytorch", "pytorch_lightning")

__all__ = ["monitor_callback"]


class Watch:
    """What the callback does; :func:`monitor_callback` makes a Lightning ``Callback`` of it.

    Attributes:
        monitor: of the present or last training; ``None`` before the first.
    """

    monitor: Monitor | None = None

    def __init__(
        self,
        spheres: Any,
        *,
        model: nn.Module | None = None,
        optimizer_index: int = 0,
        by: By = "kind",
        **options: Any,
    ) -> None:
        self._spheres, self._options, self._by = spheres, options, by
        self._model, self._optimizer_index = model, optimizer_index
        self._logged = -1

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Start watching, from the step of the checkpoint if there is one."""
        self.on_train_end(trainer, pl_module)
        self._logged = -1
        self.monitor = Monitor(
            pl_module if self._model is None else self._model,
            trainer.optimizers[self._optimizer_index],
            self._spheres,
            **{"start": int(trainer.global_step) or None, **self._options},
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:  # noqa: ARG002
        """Log the metrics of a sample when they are here."""
        if self.monitor is None:
            return
        metrics = self.monitor.latest(wait=False, by=self._by)
        samples = self.monitor.seen.samples
        if samples and samples[-1].step > self._logged:
            self._logged = samples[-1].step
            pl_module.log_dict(metrics)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Stop watching, and write what is left."""
        if self.monitor is not None:
            self.monitor.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: Any) -> None:  # noqa: ARG002
        """Write what is left of a training that broke off."""
        self.on_train_end(trainer, pl_module)


def monitor_callback(
    spheres: Any,
    *,
    model: nn.Module | None = None,
    optimizer_index: int = 0,
    by: By = "kind",
    **options: Any,
) -> Any:
    """Return a callback that watches a training of Lightning, and logs to its loggers.

    ``Trainer(callbacks=[monitor_callback(audit, model=module.net)])``. Its ``monitor`` is the
    :class:`~onsphere.Monitor`.

    Args:
        spheres: an audit, or what else :class:`~onsphere.Monitor` takes.
        model: the audited model, where that is a part of the ``LightningModule``.
        optimizer_index: which of the module's optimizers to watch.
        by: what is logged: the mean over layers of one ``"kind"``, or each ``"layer"``.
        options: for the monitor: ``every``, ``path``, ``writer``, ``thresholds``, and ``start``, by
            default the step of the checkpoint. A training that starts anew needs a ``path`` of its
            own; ``start=0`` replaces what the file holds.

    Returns:
        A ``lightning.pytorch.Callback``, or one of ``pytorch_lightning``.

    Raises:
        ModuleNotFoundError: neither is installed.
    """
    watch = {"model": model, "optimizer_index": optimizer_index, "by": by}
    return type("MonitorCallback", (Watch, _callback()), {})(spheres, **watch, **options)


def _callback() -> type:
    for home in _HOMES:
        try:
            found: type = import_module(home).Callback
        except ModuleNotFoundError:
            continue
        return found
    raise ModuleNotFoundError(
        "Lightning is not installed, and this callback is for its Trainer: pip install lightning"
    )
