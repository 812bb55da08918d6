"""The device's side of a monitor: copies before a step, numbers after it, and their way home."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onsphere.monitor.layer_statistics import WIDTH, Bucket, Limits
from onsphere.monitor.layers import Layer
from onsphere.monitor.step_sums import Before, copies_of, sums_of
from onsphere.optim.distributed import placement

Rate = float | Tensor


@dataclass
class Parcel:
    """Numbers on their way from the devices.

    Attributes:
        tables: layers -> their numbers, one table per bucket; on the CPU when they have arrived.
        rates: learning rates that were tensors, by layer.
        skipped: per layer, whether it had no gradient at all, so that the optimizer left it alone.
        marks: what the devices pass when they have sent everything.
    """

    tables: list[tuple[list[int], Tensor]]
    rates: dict[int, Tensor]
    skipped: list[bool]
    marks: list[torch.Event] = field(default_factory=list)

    @property
    def arrived(self) -> bool:
        """Whether everything is here; nothing is waited for."""
        return all(mark.query() for mark in self.marks)

    def wait(self) -> None:
        """Wait until everything is here."""
        for mark in self.marks:
            mark.synchronize()

    def table(self, layers: int) -> Tensor:
        """Return the numbers of all layers in their order, shape ``(layers, WIDTH)``."""
        whole = torch.empty(layers, WIDTH, dtype=torch.float64)
        for members, part in self.tables:
            whole[members] = part.double()
        return whole


class Sampler:
    """Measures single steps of the watched layers; never waits for a device.

    Args:
        layers: what is watched.
        degrees: per layer, the power of the norm in the effective rate.
        floors: per layer, the gradient norm below which the optimizer's eps takes over.
        limits: when a vector is counted.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        degrees: Sequence[int],
        floors: Sequence[float],
        limits: Limits,
    ) -> None:
        self._layers, self._limits = list(layers), limits
        self._before: list[Before] | None = None
        groups: dict[tuple[int, torch.device], list[int]] = {}
        for number, layer in enumerate(layers):
            groups.setdefault((layer.vectors, layer.params[0].device), []).append(number)
        self._buckets = [
            Bucket(
                members,
                torch.tensor([[float(degrees[n])] for n in members], device=device),
                torch.tensor([[floors[n]] for n in members], device=device),
            )
            for (_, device), members in groups.items()
        ]

    def before(self, *, early: bool = True) -> None:
        """Keep a copy of the watched weights, and read the gradients that are there.

        Args:
            early: whether they are those of the step; otherwise they are read after it.
        """
        self._before = copies_of(self._layers, early=early)

    def after(self, rates: Sequence[Rate]) -> Parcel | None:
        """Measure the step since :meth:`before`, and send the numbers off.

        Args:
            rates: per layer, the learning rate of the step.

        Returns:
            The numbers on their way; ``None`` if there is no copy to compare with.
        """
        if self._before is None:
            return None
        held, self._before = self._before, None
        sums = sums_of(self._layers, held)
        del held
        tables = [(b.members, b.reduce(sums, self._limits)) for b in self._buckets]
        skipped = [all(p.grad is None for p in layer.params) for layer in self._layers]
        return _sent(tables, {n: r for n, r in enumerate(rates) if isinstance(r, Tensor)}, skipped)


def _sent(
    tables: list[tuple[list[int], Tensor]], rates: dict[int, Tensor], skipped: list[bool]
) -> Parcel:
    """Start the copies to the CPU, and mark their end on each device."""
    away = {x.device for _, x in tables} | {r.device for r in rates.values()}
    # A rate on the CPU is changed in place by schedulers; elsewhere the copy home is one.
    parcel = Parcel(
        [(members, _homewards(x)) for members, x in tables],
        {n: _homewards(placement.local(r).detach().clone()) for n, r in rates.items()},
        skipped,
    )
    for device in away:
        if device.type == "cuda":
            with torch.cuda.device(device):
                mark = torch.Event(device)
                mark.record()
            parcel.marks.append(mark)
    return parcel


def _homewards(x: Tensor) -> Tensor:
    """Copy to the CPU: from a CUDA device without waiting, from any other kind as it comes."""
    return x.to("cpu", non_blocking=x.device.type == "cuda")


def floor_of(eps: float, coordinates: int) -> float:
    r"""Return :math:`\epsilon\sqrt C`, the norm of a gradient whose entries are as large as eps.

    Example:
        >>> floor_of(1e-8, 100)
        1e-07
    """
    return eps * math.sqrt(coordinates)
