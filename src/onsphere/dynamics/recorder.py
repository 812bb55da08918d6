r"""A recorder of what each step of an optimizer does to the norms and directions of weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from onsphere.geometry import VectorAxes

QUANTITIES = ("norm", "gradient_square", "effective_lr", "rotation", "radial")


class NormRecorder:
    r"""Record norms, effective rates and rotations of weights, one entry per optimizer step.

    For each vector :math:`w` that a step with rate :math:`\eta` and gradient :math:`g` takes to
    :math:`w' = w + d`, all in float64:

    - ``norm``: :math:`|w|`, before the step, in the units of the weight;
    - ``gradient_square``: :math:`|g|^2`, with ``p.grad`` as the step left it;
    - ``effective_lr``: :math:`\eta/|w|^2`, the rate of the same step on the unit sphere;
    - ``rotation``: the angle between :math:`w` and :math:`w'` in radians, from the chord,
      :math:`2\,\mathrm{atan2}(|\hat w - \hat w'|, |\hat w + \hat w'|)`;
    - ``radial``: the radial share of the update :math:`\langle\hat w, d\rangle/|d|`, from -1
      (pure shrinking) through 0 (tangent, or no update) to 1 (pure growth).

    A zero vector has no direction, so its last three are NaN; means are over the vectors that
    have one. Where there is no gradient, ``gradient_square`` is NaN.

    The recorder hooks itself to ``optimizer.step`` and reads nothing back from the device until
    :meth:`series` is called.

    Args:
        optimizer: the optimizer that moves those parameters.
        spheres: name -> (parameter, which of its entries form one vector).
        every: record each ``every``-th step, the first one included.
        per_vector: keep every vector's value instead of their mean.

    Raises:
        ValueError: a tensor that the optimizer does not move, axes that it does not have, or
            ``every`` below 1.

    Example:
        >>> import torch
        >>> from onsphere.geometry import VectorAxes
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> recorder = NormRecorder(optimizer, {"rows": (weight, VectorAxes(index=(0,)))})
        >>> weight.grad = torch.tensor([[-8.0, 6.0]])
        >>> optimizer.step()
        >>> for name, values in recorder.series("rows").items():
        ...     print(name, [abs(round(value, 6)) for value in values.tolist()])
        step [0]
        norm [5.0]
        gradient_square [100.0]
        effective_lr [0.02]
        rotation [0.785398]
        radial [0.0]
        >>> recorder.detach()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        spheres: Mapping[str, tuple[Tensor, VectorAxes]],
        *,
        every: int = 1,
        per_vector: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is at least 1, got {every}")
        for name, (param, axes) in spheres.items():
            _group_of(param, optimizer, name)
            axes.count(param.shape)
        self._spheres = dict(spheres)
        self._every = every
        self._per_vector = per_vector
        self._count = 0
        self._steps: list[int] = []
        self._rows: dict[str, list[Tensor]] = {name: [] for name in spheres}
        self._before: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._look_before),
            optimizer.register_step_post_hook(self._look_after),
        ]

    def __enter__(self) -> "NormRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the recorded weights."""
        return tuple(self._spheres)

    def series(self, name: str) -> dict[str, Tensor]:
        """Return everything recorded under a name.

        Args:
            name: one of :attr:`names`.

        Returns:
            ``step`` (int64, counted from 0) and the five quantities (float64), each of shape
            ``(records,)``, or ``(records, vectors)`` with ``per_vector``; on the CPU.

        Raises:
            KeyError: nothing is recorded under this name.
        """
        if name not in self._rows:
            raise KeyError(f"nothing is recorded as {name!r}; there is {', '.join(self._rows)}")
        steps = torch.tensor(self._steps, dtype=torch.int64)
        rows = self._rows[name]
        if rows:
            table = torch.stack(rows).cpu()
        else:
            param, axes = self._spheres[name]
            vectors = (axes.count(param.shape),) if self._per_vector else ()
            table = torch.empty(0, len(QUANTITIES), *vectors, dtype=torch.float64)
        return {"step": steps, **dict(zip(QUANTITIES, table.unbind(1), strict=True))}

    def detach(self) -> None:
        """Stop recording; what was recorded stays readable. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()

    @torch.no_grad()
    def _look_before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        if self._count % self._every == 0:
            self._before = {name: param.clone() for name, (param, _) in self._spheres.items()}

    @torch.no_grad()
    def _look_after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        if self._before:
            for name, (param, axes) in self._spheres.items():
                lr = _group_of(param, optimizer, name)["lr"]
                row = measure_step(self._before[name], param, param.grad, lr, axes)
                self._rows[name].append(row if self._per_vector else row.nanmean(-1))
            self._steps.append(self._count)
            self._before = {}
        self._count += 1


def measure_step(
    before: Tensor, after: Tensor, grad: Tensor | None, lr: float | Tensor, axes: VectorAxes
) -> Tensor:
    """Measure one step, as :class:`NormRecorder` defines it.

    Args:
        before: the weight before the step.
        after: the weight after it.
        grad: the gradient of the step, if there was one.
        lr: the learning rate of the step.
        axes: which entries of the weight form one vector.

    Returns:
        Shape ``(5, vectors)`` in float64: the quantities in the order of ``QUANTITIES``.
    """
    view, inside = axes.split(before.double())
    ahead, _ = axes.split(after.double())
    norms, update = _norms(view, inside), ahead - view
    here, there = view / norms, ahead / _norms(ahead, inside)
    rotation = 2 * torch.atan2(_norms(here - there, inside), _norms(here + there, inside))
    moved = _norms(update, inside)
    # No update is tangent; an update of a zero vector is 0/0 through `here`, and stays NaN.
    radial = _sum(here * update, inside) / torch.where(moved > 0, moved, 1.0)
    effective = torch.where(norms > 0, lr / norms.square(), torch.nan)
    if grad is None:
        squares = torch.full_like(norms, torch.nan)
    else:
        slope, _ = axes.split(grad.to_dense().double() if grad.is_sparse else grad.double())
        squares = _norms(slope, inside).square()
    return torch.stack([norms, squares, effective, rotation, radial]).flatten(1)


def _norms(x: Tensor, inside: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(x, dim=inside, keepdim=True) if inside else x.abs()


def _sum(x: Tensor, inside: tuple[int, ...]) -> Tensor:
    return x.sum(inside, keepdim=True) if inside else x


def _group_of(param: Tensor, optimizer: Optimizer, name: str) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(param is member for member in group["params"]):
            return group
    raise ValueError(
        f"{name!r} is not among the optimizer's parameters; pass the very tensor that it was given"
    )
