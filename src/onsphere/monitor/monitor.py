"""The monitor: hooks on an optimizer, samples kept and written, and flags raised."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from onsphere.dynamics.optimizers import ON_SPHERES, OptimizerLaw
from onsphere.errors import choice
from onsphere.monitor.flags import History, Thresholds, flags_of, together
from onsphere.monitor.forecast import Forecast, degree_of, eps_of, law_of
from onsphere.monitor.journal import Journal, about, settings_of, vector_of
from onsphere.monitor.layer_statistics import Limits
from onsphere.monitor.layers import Layer, MonitorError, layers_of, stepping
from onsphere.monitor.rendering.tensorboard import ScalarWriter, by_kind, metrics, write
from onsphere.monitor.run import COUNTS, PREDICTIONS, QUANTITIES, STATISTICS, Flag, Run, Sample
from onsphere.monitor.sampler import Parcel, Sampler, floor_of
from onsphere.optim.compiled import untraced
from onsphere.optim.updates.types import rate_of
from onsphere.version import __version__

if TYPE_CHECKING:
    import pandas as pd

By = Literal["layer", "kind"]
_EFFECTIVE = QUANTITIES.index("effective_lr")
_SHAPE = (len(QUANTITIES), len(STATISTICS))


class Monitor:
    r"""Watch norms and rotations of weights on spheres during training, against the laws.

    At each ``every``-th ``optimizer.step()``, for each vector :math:`w` (a filter, a row, a whole
    matrix: as the audit says) that the step with gradient :math:`g` moves by :math:`d`:

    - ``norm``: :math:`|w|` before the step; ``gradient``: :math:`|g|`, as the step found it (of
      a step with a closure, as it left it);
    - ``effective_lr``: :math:`\eta/|w|^2` for SGD and where no law is known, :math:`\eta/|w|` for
      Adam, AdamW, Lion and Muon, whose steps do not scale with the gradient, :math:`\eta` itself
      where it is relative to the length (the default of the sphere optimizers);
    - ``rotation``: the angle between :math:`w` and :math:`w + d` in radians;
    - ``radial``: :math:`\langle w, d\rangle/|w||d|`, the share of the update that changes the norm;
    - ``unit_gradient_square``: :math:`|w|^2|g|^2`, what the laws call :math:`L`.

    Mean and quantiles over the vectors of a layer are kept, beside the norm and rotation that the
    law of this optimizer expects from its present settings
    (:mod:`onsphere.monitor.forecast`); where there is no law, there is no prediction. :attr:`flags`
    says in plain words what went wrong.

    The hot path waits for no device: numbers come home on their own and are read when they are
    there. Steps between samples cost nothing but a count; a sampled one needs memory for one copy
    of the watched weights. Sharded weights (``DTensor``) cost one small all-reduce per sample and
    dimension of the mesh, and all processes see the same numbers; one of them writes.

    Args:
        model: the model, for the names of its weights; it may be compiled or wrapped.
        optimizer: the optimizer whose ``step`` is called. For ``on_sphere(...)`` give its result.
        spheres: an :class:`~onsphere.Audit` of the model (anything with ``spheres_of(model)``);
            or parameters, or their names -> :class:`~onsphere.geometry.Sphere` or
            :class:`~onsphere.geometry.VectorAxes`; or param groups with ``sphere``. Not needed for
            an optimizer that has spheres itself. ``"matrices"`` watches all matrices, on spheres or
            not, without laws; so does an audit that found no sphere, after a warning.
        every: sample each ``every``-th step, the first one included.
        start: number of the first step: that of the checkpoint when a run is resumed; by default 0.
        path: a JSON-lines file to append to. If it holds samples, ``start`` must be given, and
            those from it on no longer count; :meth:`onsphere.monitor.Run.read` reads it.
        writer: has ``add_scalar(tag, value, step)``, as TensorBoard's ``SummaryWriter``.
        thresholds: when to flag.

    Raises:
        MonitorError: nothing to watch, or a weight that does not fit its sphere.
        RunError: ``path`` cannot be written, holds something else than a run of these layers, or
            samples while no ``start`` is given.
        ValueError: ``every`` below 1 or ``start`` below 0.

    Example:
        >>> from onsphere.geometry import VectorAxes
        >>> net = nn.Linear(2, 1, bias=False)
        >>> net.weight.data = torch.tensor([[3.0, 4.0]])
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        >>> with Monitor(net, optimizer, {"weight": VectorAxes((0,))}) as monitor:
        ...     net.weight.grad = torch.tensor([[-8.0, 6.0]])
        ...     optimizer.step()
        >>> for name, value in monitor.latest().items():
        ...     print(name, round(abs(value), 4))
        onsphere/norm/weight 5.0
        onsphere/rotation/weight 0.7854
        onsphere/effective_lr/weight 0.02
        onsphere/radial/weight 0.0
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        spheres: Any = None,
        *,
        every: int = 10,
        start: int | None = None,
        path: str | Path | None = None,
        writer: ScalarWriter | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        first = 0 if start is None else start
        if every < 1 or first < 0:
            raise ValueError(f"every is at least 1 and start at least 0, got {every} and {first}")
        self._optimizer = stepping(optimizer)
        self._layers = layers_of(model, self._optimizer, spheres)
        self._thresholds = thresholds or Thresholds()
        self.step = first
        self._writer = writer if _writes() else None
        groups = [self._optimizer.param_groups[layer.group] for layer in self._layers]
        pairs = list(zip(self._layers, groups, strict=True))
        laws = [_law_of(self._optimizer, group, layer) for layer, group in pairs]
        degrees = [degree_of(self._optimizer, law) for law in laws]
        self._run = Run(
            optimizer=settings_of(self._optimizer, self._layers),
            layers={
                layer.name: about(layer, None if law is None else law.name, degree)
                for layer, law, degree in zip(self._layers, laws, degrees, strict=True)
            },
            every=every,
            versions={"onsphere": __version__, "torch": torch.__version__},
        )
        self._sampler = Sampler(
            self._layers,
            degrees,
            [floor_of(eps_of(self._optimizer, group), layer.coordinates) for layer, group in pairs],
            Limits(self._thresholds.patience, self._thresholds.leak),
        )
        self._forecast = Forecast(laws, [vector_of(layer) for layer in self._layers])
        self._journal = Journal(path, self._run, start) if path and _writes() else None
        self._pending: deque[tuple[int, Parcel, list[Mapping[str, Any]]]] = deque()
        self._peaks: list[Sample] = []
        held = [] if self._journal is None else self._journal.flags
        self._raised = {(flag.kind, flag.layer) for flag in held}
        self._handles: list[RemovableHandle] = [
            self._optimizer.register_step_pre_hook(self._look_before),
            self._optimizer.register_step_post_hook(self._look_after),
        ]

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        from onsphere.monitor.rendering.terminal import text

        return text(self.run)

    def __repr__(self) -> str:
        return f"<Monitor, next step {self.step}: {self.seen!r}>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    @property
    def run(self) -> Run:
        """Everything sampled so far; waits for numbers on their way."""
        self.flush()
        return self._run

    @property
    def seen(self) -> Run:
        """Everything that has come home so far; waits for nothing."""
        return self._run

    @property
    def flags(self) -> list[Flag]:
        """What deserves a look, each kind once per layer; waits for numbers on their way."""
        return list(self.run.flags)

    @property
    def rows(self) -> list[dict[str, float | int | str]]:
        """One row per sample and layer: means, quantiles, counts and predictions, all flat."""
        from onsphere.monitor.rendering.dataframe import rows

        return rows(self.run)

    def to_frame(self) -> "pd.DataFrame":
        """Return :attr:`rows` as a pandas DataFrame, indexed by step and layer.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        from onsphere.monitor.rendering.dataframe import frame

        return frame(self.run)

    def latest(self, *, wait: bool = True, by: By = "layer") -> dict[str, float]:
        """Return the metrics of the last sample, named as loggers know them.

        Args:
            wait: for numbers that are still on their way; otherwise the last ones that are here.
            by: ``"layer"``, or ``"kind"`` for the mean over layers whose names differ in a number
                only: ``layers.all.q_proj.weight``. A deep model has few kinds.

        Returns:
            ``onsphere/QUANTITY/LAYER`` -> mean over the layer's vectors; nothing before the first
            sample.
        """
        by = cast(By, choice("by", by, get_args(By)))
        samples = (self.run if wait else self._drained()).samples
        if not samples:
            return {}
        found = metrics(samples[-1], list(self._run.layers))
        return found if by == "layer" else by_kind(found)

    def to_html(self, path: str | Path) -> Path:
        """Write the run as one page: what was measured, what was expected, what was flagged.

        Args:
            path: where; an older file is replaced.

        Returns:
            The path.

        Raises:
            ModuleNotFoundError: the extra ``onsphere[study]`` is not installed.
        """
        from onsphere.monitor.rendering.html import to_html

        return to_html(self.run, path)

    def live(self, **options: Any) -> AbstractContextManager[Any]:
        """Return a view for the terminal that renews itself: ``with monitor.live(): train()``.

        Args:
            options: for :class:`rich.live.Live`.
        """
        from onsphere.monitor.rendering.terminal import live

        return live(lambda: self.seen, **options)

    def flush(self) -> None:
        """Wait for the numbers that are on their way, and write them."""
        while self._pending:
            self._pending[0][1].wait()
            self._arrived()

    def close(self) -> None:
        """Stop watching, and write what is left; everything stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.flush()
        if self._journal is not None:
            self._journal.close()

    @untraced
    @torch.no_grad()
    def _look_before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.step % self._run.every == 0:
            self._sampler.before(early=_has_gradients(optimizer, args, kwargs))

    @untraced
    @torch.no_grad()
    def _look_after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        self._drained()
        groups = [optimizer.param_groups[layer.group] for layer in self._layers]
        parcel = None
        if self.step % self._run.every == 0:
            parcel = self._sampler.after([rate_of(group) for group in groups])
        if parcel is not None:
            settings: list[Mapping[str, Any]] = [
                {k: v for k, v in g.items() if k != "params"} for g in groups
            ]
            self._pending.append((self.step, parcel, settings))
        self.step += 1

    def _drained(self) -> Run:
        """Take in what has come home, without waiting."""
        while self._pending and self._pending[0][1].arrived:
            self._arrived()
        return self._run

    def _arrived(self) -> None:
        """Read the oldest parcel, predict, flag, keep and write."""
        step, parcel, settings = self._pending.popleft()
        lrs = [_rate(parcel, n, group) for n, group in enumerate(settings)]
        sample = _sample(step, parcel.table(len(self._layers)), lrs)
        sample.predicted[:] = self._forecast.at(sample, settings, parcel.skipped)
        self._run.samples.append(sample)
        if self._journal is not None:
            self._journal.sample(sample)
        if self._writer is not None:
            write(self._writer, sample, list(self._run.layers))
        self._flag(sample, parcel.skipped)

    def _flag(self, sample: Sample, skipped: Sequence[bool]) -> None:
        self._peaks = self._peaks or [sample] * len(self._layers)
        raised: list[Flag] = []
        first, recent = self._run.samples[0], self._run.samples[-self._thresholds.patience :]
        for row, (name, told) in enumerate(self._run.layers.items()):
            if not _peak(sample, row) <= _peak(self._peaks[row], row):
                self._peaks[row] = sample
            history = History(name, told, row, first, self._peaks[row], recent, skipped[row])
            for flag in flags_of(history, self._thresholds):
                if (flag.kind, name) not in self._raised:
                    self._raised.add((flag.kind, name))
                    raised.append(flag)
        for flag in together(raised):
            self._run.flags.append(flag)
            if self._journal is not None:
                self._journal.flag(flag)


def _law_of(optimizer: Optimizer, group: Mapping[str, Any], layer: Layer) -> OptimizerLaw | None:
    """Return the law of a layer: of one that is not scale-invariant, only that its norm is held."""
    law = law_of(optimizer, group, layer)
    holds = not layer.sphere.invariant and law in ON_SPHERES.values()
    return law if layer.invariant or holds else None


def _sample(step: int, table: Tensor, lrs: Sequence[float]) -> Sample:
    kept = math.prod(_SHAPE)
    values = table[:, :kept].reshape(-1, *_SHAPE).numpy()
    values[:, _EFFECTIVE] *= np.array(lrs)[:, None]
    predicted = np.full((len(lrs), len(PREDICTIONS)), np.nan)
    counts = table[:, kept : kept + len(COUNTS)].numpy()
    return Sample(step, np.array(lrs), values, counts, predicted)


def _peak(sample: Sample, row: int) -> float:
    """Return the effective rate; a sample where it has no value is no peak."""
    value = float(sample.values[row, _EFFECTIVE, STATISTICS.index("q50")])
    return value if math.isfinite(value) else -math.inf


def _rate(parcel: Parcel, number: int, group: Mapping[str, Any]) -> float:
    held = parcel.rates.get(number)
    return float(rate_of(group)) if held is None else float(held.double().numpy())


def _has_gradients(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the gradients before a step are its own: no closure makes them, no scale is left."""
    closure = kwargs.get("closure", next(filter(callable, args), None))
    # A GradScaler leaves its factor to optimizers that can undo it in the step.
    return closure is None and getattr(optimizer, "grad_scale", None) is None


def _writes() -> bool:
    """Whether this process is the one that writes files."""
    dist = torch.distributed
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


__all__ = ["Monitor", "MonitorError"]
