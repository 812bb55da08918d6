r"""Auto-PGD: projected gradient ascent that chooses its own step sizes.

With :math:`\Pi` the projection of :class:`Threat`, :math:`d` its direction of ascent and
:math:`f` the loss of one example,

.. math::
    z_k = \Pi(x_k + \eta\,d(\nabla f(x_k))), \qquad
    x_{k+1} = \Pi(x_k + \alpha (z_k - x_k) + (1 - \alpha)(x_k - x_{k-1})),

:math:`\alpha = 3/4` (1 in the first step), :math:`\eta = 2\epsilon` at first. At each checkpoint,
an example halves its step and goes back to its best point if the loss rose in fewer than 3/4 of
the steps since the last one, or if there it did not halve and its best loss is still the same.

Source: Croce & Hein, 2020 (arXiv 2003.01690), algorithm 1 and section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from onsphere.errors import choice
from onsphere.robustness.attacks import losses
from onsphere.robustness.attacks.losses import Goal
from onsphere.robustness.attacks.pgd import (
    LEFT_BEFORE_GATHER,
    Model,
    check_logits,
    loss_and_gradient,
    no_loss,
)
from onsphere.robustness.attacks.target_classes import at_once, nearest_classes
from onsphere.robustness.attacks.threat_model import Norm, Threat, per_example

_MOMENTUM = 0.75
_RISING = 0.75  # a step size is kept while the loss rises in at least this share of the steps
TEMPERATURE = 0.15
"""Temperature of the cross-entropy in units of the logits' spread: on networks trained to the
usual spread of about 7 the tempered loss is the plain one."""


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    loss: str = "tempered_cross_entropy",
    steps: int = 100,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Climb the loss by Auto-PGD from random points of the ball.

    Per example the result is the first point visited that is misclassified (``x`` itself, where
    the model is wrong already), otherwise the one with the highest loss. An example leaves once it
    is misclassified.

    Args:
        model: a classifier.
        x: inputs, shape ``(batch, ...)``, inside the bounds.
        y: labels, shape ``(batch,)``.
        eps: radius of the ball, in the units of the input.
        norm: ``"linf"`` or ``"l2"``.
        bounds: least and greatest value of an entry.
        loss: ``"tempered_cross_entropy"``, which no scale of the logits changes
            (:func:`~onsphere.robustness.attacks.losses.tempered_cross_entropy`),
            ``"cross_entropy"``, which large logits blind, or ``"dlr"``.
        steps: gradient evaluations per run.
        restarts: number of runs.
        generator: source of the random starts, on the device of ``x``; torch's global one if not
            given.

    Returns:
        The changed inputs, in the order of ``x``.

    Raises:
        ValueError: as :func:`fgsm`, or fewer than one step or restart.
        TypeError: as :func:`fgsm`.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([0, 0])
        >>> apgd(torch.nn.Identity(), x, y, eps=0.25, steps=5).argmax(1)
        tensor([1, 0])

    Source: Croce & Hein, 2020 (arXiv 2003.01690), algorithm 1.
    """
    threat = _checked(eps, norm, bounds, x, y, {"steps": steps, "restarts": restarts})
    loss = choice("loss", loss, _GOALS)
    logits, best, standing = _clean(model, x, y)
    if not len(standing):
        return best
    start = threat.sample(x[standing], generator)
    goal = _GOALS[loss](model, logits[standing], start)  # one for all runs: their losses compare
    highest = no_loss(x)
    for run in range(restarts):
        if not len(standing):
            break
        if run:
            start = threat.sample(x[standing], generator)
        found, value, fooled = climb(model, x[standing], y[standing], start, goal, threat, steps)
        better = fooled | (value > highest[standing])
        best[standing[better]] = found[better]
        highest[standing[better]] = value[better]
        standing, goal = standing[~fooled], goal.take(~fooled)
    return best


def apgd_targeted(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    early_stopping_factor: float | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Climb the targeted DLR loss by Auto-PGD, for each of the nearest wrong classes (APGD-T).

    An example leaves once it is misclassified, as whatever class. Several targets of an example
    are attacked together where few examples are left.

    Args:
        model: a classifier.
        x: inputs, shape ``(batch, ...)``, inside the bounds.
        y: labels, shape ``(batch,)``.
        eps: radius of the ball, in the units of the input.
        norm: ``"linf"`` or ``"l2"``.
        bounds: least and greatest value of an entry.
        targets: how many of the wrong classes, those with the largest clean logits.
        steps: gradient evaluations per target and run.
        restarts: number of runs over all targets.
        early_stopping_factor: if given, a target is also left when, at a checkpoint, this many
            times the rise of its loss since the last checkpoint would not bring the loss to zero.
        batch_size: pairs of example and target that go through the model at once, if there are more
            pairs than examples.
        generator: source of the random starts, on the device of ``x``; torch's global one if not
            given.

    Returns:
        The changed inputs, in the order of ``x``: misclassified, or else with the largest loss.

    Raises:
        ValueError: as :func:`apgd`, or fewer than one target.
        TypeError: as :func:`apgd`.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[0.6, 0.4, 0.3], [0.9, 0.1, 0.0]]), torch.tensor([0, 0])
        >>> apgd_targeted(torch.nn.Identity(), x, y, eps=0.25, steps=5).argmax(1) == y
        tensor([False,  True])

    Source: Croce & Hein, 2020 (arXiv 2003.01690), section 4.
    """
    counts = {"steps": steps, "restarts": restarts, "targets": targets, "batch_size": batch_size}
    threat = _checked(eps, norm, bounds, x, y, counts)
    logits, best, standing = _clean(model, x, y)
    if not len(standing):
        return best
    order = nearest_classes(logits, y, targets)
    highest = no_loss(x)
    for _ in range(restarts):
        column = 0
        while column < order.shape[1] and len(standing):
            width = at_once(len(standing), order.shape[1] - column, batch_size)
            aim = order[standing, column : column + width]
            rows = standing.repeat_interleave(width)
            goal = Goal(losses.targeted_dlr, aim.flatten())
            start = threat.sample(x[rows], generator)
            found, value, fooled = climb(
                model, x[rows], y[rows], start, goal, threat, steps, early_stopping_factor
            )
            # A misclassified point counts more than any loss.
            rank = torch.where(fooled, torch.inf, value).view(-1, width)
            value, choice = rank.max(1)
            better = value > highest[standing]
            chosen = (torch.arange(len(standing), device=x.device) * width + choice)[better]
            best[standing[better]] = found[chosen]
            highest[standing[better]] = value[better]
            standing = standing[~fooled.view(-1, width).any(1)]
            column += width
    return best


def checkpoints(steps: int) -> list[int]:
    r"""Return after which steps Auto-PGD may halve its step size.

    :math:`w_j = \\lceil p_j N\\rceil` with :math:`p_0 = 0`, :math:`p_1 = .22`,
    :math:`p_{j+1} = p_j + \\max(p_j - p_{j-1} - .03, .06)`.

    Example:
        >>> checkpoints(100)
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    hundredths, length = [22], 22
    while hundredths[-1] < 100:
        length = max(length - 3, 6)
        hundredths.append(hundredths[-1] + length)
    return sorted({-(-p * steps // 100) for p in hundredths if p <= 100})


@dataclass
class _State:
    """An ascent of a batch: every field has one entry per example."""

    rows: Tensor  # where the example stands in the results
    x: Tensor
    y: Tensor
    extra: Tensor
    z: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step: Tensor
    rises: Tensor
    halved: Tensor
    mark: Tensor  # the best loss at the last checkpoint
    gone: Tensor  # whether the example need not stay

    def keep(self, mask: Tensor) -> None:
        """Let the other examples leave."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[mask])

    def move(self, threat: Threat, momentum: float) -> None:
        """Take one step."""
        ahead = threat.project(
            self.z + per_example(self.step, self.z) * threat.ascent(self.gradient), self.x
        )
        moved = self.z + momentum * (ahead - self.z) + (1 - momentum) * (self.z - self.previous)
        self.previous, self.z = self.z, threat.project(moved, self.x)

    def note(self, loss: Tensor, gradient: Tensor | None) -> None:
        """Compare the loss of the new point with the last and the best."""
        self.rises += loss > self.loss
        self.loss = loss
        better = loss > self.best_loss
        at = per_example(better, self.z)
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best = torch.where(at, self.z, self.best)
        if gradient is not None:
            self.gradient = gradient
            self.best_gradient = torch.where(at, gradient, self.best_gradient)

    def outcome(self, found: Tensor, value: Tensor, fooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the point that fools, where there is one, and otherwise the best."""
        fools = fooled[self.rows]
        points = torch.where(per_example(fools, self.z), found[self.rows], self.best)
        return points, torch.where(fools, value[self.rows], self.best_loss)

    def stop_early(self, factor: float) -> None:
        """Let those leave that ``factor`` times their last progress would not bring to zero."""
        rise = self.best_loss - self.mark
        self.gone |= self.best_loss + factor * rise < 0

    def halve(self, length: int) -> None:
        """Halve the steps of examples that are stuck, and send these back to their best points."""
        stuck = (self.rises < _RISING * length) | (~self.halved & (self.best_loss <= self.mark))
        at = per_example(stuck, self.z)
        self.step = torch.where(stuck, self.step / 2, self.step)
        self.z = torch.where(at, self.best, self.z)
        self.previous = torch.where(at, self.best, self.previous)
        self.gradient = torch.where(at, self.best_gradient, self.gradient)
        self.loss = torch.where(stuck, self.best_loss, self.loss)
        self.halved, self.mark = stuck, self.best_loss
        self.rises = torch.zeros_like(self.rises)


def climb(
    model: Model,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    goal: Goal,
    threat: Threat,
    steps: int,
    early_stopping_factor: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Auto-PGD once, from ``z``: the best points, their losses, and whether they fool."""
    loss, fooled, gradient = loss_and_gradient(model, z, y, goal, differentiate=True)
    assert gradient is not None
    found, value = z.clone(), loss.clone()
    state = _State(
        torch.arange(len(x), device=x.device), x, y, goal.extra, z, z, gradient, loss, z, gradient,
        loss, torch.full_like(loss, 2 * threat.eps).to(z.dtype), torch.zeros_like(loss),
        torch.zeros_like(fooled), loss, fooled.clone(),
    )  # fmt: skip
    last, stops = 0, checkpoints(steps)
    for step in range(1, steps + 1):
        if int(state.gone.sum()) >= LEFT_BEFORE_GATHER * len(state.gone):
            found[state.rows], value[state.rows] = state.outcome(found, value, fooled)
            state.keep(~state.gone)
        if not len(state.rows):
            break
        state.move(threat, _MOMENTUM if step > 1 else 1.0)
        loss, wrong, gradient = loss_and_gradient(
            model, state.z, state.y, Goal(goal.loss, state.extra), differentiate=step < steps
        )
        state.note(loss, gradient)
        new = wrong & ~fooled[state.rows]
        found[state.rows[new]], value[state.rows[new]] = state.z[new], loss[new]
        fooled[state.rows[new]] = True
        state.gone |= wrong
        if step in stops:
            if early_stopping_factor is not None:
                state.stop_early(early_stopping_factor)
            state.halve(step - last)
            last = step
    found[state.rows], value[state.rows] = state.outcome(found, value, fooled)
    return found, value, fooled


def _clean(model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clean logits, a copy of the inputs, and which examples are right."""
    if not len(x):
        return x.new_zeros(0, 0), x.detach().clone(), torch.arange(0, device=x.device)
    with torch.no_grad():
        logits = model(x.detach())
    check_logits(logits, y)
    right = (logits.argmax(1) == y) & ~logits.isnan().any(1)
    return logits, x.detach().clone(), right.nonzero().squeeze(1)


def _tempered(model: Model, logits: Tensor, start: Tensor) -> Goal:
    with torch.no_grad():
        moved = model(start)
    return Goal(losses.tempered_cross_entropy, TEMPERATURE * losses.spread(logits, moved))


_Aim = Callable[[Model, Tensor, Tensor], Goal]  # from a model, clean logits, and starting points


def _plain(loss: Callable[[Tensor, Tensor], Tensor]) -> _Aim:
    return lambda _, logits, __: Goal(lambda z, y, ___: loss(z, y), logits[:, 0])


_GOALS: dict[str, _Aim] = {
    "tempered_cross_entropy": _tempered,
    "cross_entropy": _plain(losses.cross_entropy),
    "dlr": _plain(losses.dlr),
}


def _checked(
    eps: float,
    norm: Norm,
    bounds: tuple[float, float],
    x: Tensor,
    y: Tensor,
    counts: dict[str, int],
) -> Threat:
    threat = Threat(eps, norm, bounds)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is at least 1, got {count}")
    threat.check(x, y)
    return threat
