"""Gradient attacks on any classifier: the fast gradient step, and projected gradient ascent.

A *model* is any callable from a batch of inputs to logits ``(batch, classes)``. It is run in the
mode it is in and its parameters are not touched, their ``grad`` included: gradients are taken with
respect to the input only. Call ``model.eval()`` first: in training mode BatchNorm makes every
example depend on its batch (and updates its running statistics), so no per-example attack is
defined.

Source: Goodfellow et al., 2014 (arXiv 1412.6572); Madry et al., 2017 (arXiv 1706.06083).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from onsphere.errors import choice
from onsphere.robustness.attacks.losses import LOSSES
from onsphere.robustness.attacks.threat_model import Norm, Threat
from onsphere.robustness.classifier import described

Model = Callable[[Tensor], Tensor]

# Gathering the remaining examples copies them; it pays when at least this share has left.
LEFT_BEFORE_GATHER = 0.2


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    loss: str = "cross_entropy",
) -> Tensor:
    r"""Take one step of length ``eps`` along the steepest ascent of the loss.

    :math:`x' = x + \epsilon\,\mathrm{sign}\,\nabla_x \ell` for ``"linf"``,
    :math:`x + \epsilon\,\nabla_x\ell/|\nabla_x\ell|` for ``"l2"``, then clipped to the bounds.

    Args:
        model: a classifier.
        x: inputs, shape ``(batch, ...)``, inside the bounds.
        y: labels, shape ``(batch,)``.
        eps: size of the change, in the units of the input.
        norm: ``"linf"`` or ``"l2"``.
        bounds: least and greatest value of an entry.
        loss: ``"cross_entropy"`` or ``"dlr"``.

    Returns:
        The changed inputs, whether or not they fool the model.

    Raises:
        ValueError: ``eps`` not positive, inputs outside the bounds, labels out of range, an
            unknown name, fewer than three classes for DLR.
        TypeError: inputs that are not floating point, or labels that are not integers.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> fgsm(lambda x: x @ weight, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), eps=0.25)
        tensor([[0.3500, 0.6500]])
    """
    threat = Threat(eps, norm, bounds)
    objective = _objective(loss)
    threat.check(x, y)
    if not len(x):
        return x.detach().clone()
    x = x.detach()
    _, _, gradient = loss_and_gradient(model, x, y, objective, differentiate=True)
    assert gradient is not None
    return threat.project(x + eps * threat.ascent(gradient), x)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    loss: str = "cross_entropy",
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Climb the loss by projected gradient steps, and keep the best point of each example.

    :math:`x_{t+1} = \Pi(x_t + s\,d(\nabla_x\ell))`, with :math:`d` the sign or the unit gradient
    and :math:`\Pi` the projection onto the ball, then the box (:meth:`Threat.project`). The first
    run starts at ``x`` itself, each further one at a random point of the ball.

    Per example the result is the first point visited that is misclassified (``x`` itself, where
    the model is wrong already), otherwise the one with the highest loss. An example leaves the
    batch once it is misclassified: at once between restarts, and within a run when enough have
    left that gathering the others pays.

    Args:
        model: a classifier.
        x: inputs, shape ``(batch, ...)``, inside the bounds.
        y: labels, shape ``(batch,)``.
        eps: radius of the ball, in the units of the input.
        norm: ``"linf"`` or ``"l2"``.
        bounds: least and greatest value of an entry.
        loss: ``"cross_entropy"`` or ``"dlr"``.
        steps: gradient evaluations per run.
        step_size: length of a step in the norm; ``2.5 * eps / steps`` if not given.
        restarts: number of runs.
        generator: source of the random starts, on the device of ``x``; torch's global one if not
            given. Used only by ``restarts > 1``.

    Returns:
        The changed inputs, in the order of ``x``.

    Raises:
        ValueError: as :func:`fgsm`, or fewer than one step or restart, or a step size that is not
            positive.
        TypeError: as :func:`fgsm`.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> x, y = torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([0, 0])
        >>> adversarial = pgd(lambda x: x @ weight, x, y, eps=0.25, steps=5)
        >>> (adversarial @ weight).argmax(1)       # the second example is out of reach
        tensor([1, 0])
    """
    threat = Threat(eps, norm, bounds)
    objective = _objective(loss)
    step_size = 2.5 * eps / max(steps, 1) if step_size is None else step_size
    if steps < 1 or restarts < 1 or not step_size > 0:
        raise ValueError(
            "steps and restarts are at least 1 and step_size is positive, got "
            f"steps={steps}, restarts={restarts}, step_size={step_size}"
        )
    threat.check(x, y)
    best = x.detach().clone()
    best_loss = no_loss(x)
    standing = torch.arange(len(x), device=x.device)
    for run in range(restarts):
        if not len(standing):
            break
        center = x.detach()[standing]
        start = center if run == 0 else threat.sample(center, generator)
        found, loss_found, fooled = _climb(
            model, center, y[standing], start, threat, objective, steps, step_size
        )
        better = fooled | (loss_found > best_loss[standing])
        best[standing[better]] = found[better]
        best_loss[standing[better]] = loss_found[better]
        standing = standing[~fooled]
    return best


def _climb(
    model: Model,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    threat: Threat,
    objective: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    step_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one ascent from ``z``: the best points, their losses, and whether they fool."""
    best, best_loss = z.clone(), no_loss(x)
    fooled = torch.zeros_like(best_loss, dtype=torch.bool)
    rows = torch.arange(len(x), device=x.device)  # where the current batch sits in the results
    for step in range(steps + 1):
        loss, wrong, gradient = loss_and_gradient(
            model, z, y, objective, differentiate=step < steps
        )
        done = fooled[rows]
        take = ~done & (wrong | (loss > best_loss[rows]))
        best[rows[take]] = z[take]
        best_loss[rows[take]] = loss[take]
        done |= wrong
        fooled[rows] = done
        if gradient is None:
            break
        left = int(done.sum())
        if left == len(rows):
            break
        if left >= LEFT_BEFORE_GATHER * len(rows):
            keep = ~done
            rows, x, y, z, gradient = rows[keep], x[keep], y[keep], z[keep], gradient[keep]
        z = threat.project(z + step_size * threat.ascent(gradient), x)
    return best, best_loss, fooled


def loss_and_gradient(
    model: Model,
    z: Tensor,
    y: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    *,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the loss, whether the label is missed, and the loss's gradient by the input."""
    with torch.set_grad_enabled(differentiate):
        point = z.detach().requires_grad_(differentiate)
        logits = model(point)
        check_logits(logits, y)
        losses = objective(logits, y)
        gradient = torch.autograd.grad(losses.sum(), point)[0] if differentiate else None
    if gradient is not None:  # one entry that is no number must not end the attack of an example
        gradient = gradient.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    # A model may compute in another precision than its input's.
    return losses.detach().to(no_loss(z).dtype), logits.detach().argmax(1) != y, gradient


def no_loss(x: Tensor) -> Tensor:
    """Return a loss below every other, per example, in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.full(x.shape[:1], -torch.inf, dtype=dtype, device=x.device)


def check_logits(logits: object, y: Tensor) -> None:
    """Refuse what is not one row of logits per label, or has no column for a label.

    Raises:
        ValueError: no tensor, a wrong shape, fewer than two classes, or a label out of range.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"a model returns a tensor of logits, got {described(logits)}: wrap yours, e.g. "
            "lambda x: model(x).logits"
        )
    if logits.ndim != 2 or len(logits) != len(y):
        raise ValueError(
            f"a model returns logits of shape (batch, classes): got {tuple(logits.shape)} for "
            f"{len(y)} examples"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            "a classifier has at least two classes, got one column of logits; give a single score "
            "s as two columns: torch.cat([-s, s], 1)"
        )
    if len(y):
        low, high = (int(value) for value in y.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f"labels lie in [{low}, {high}], but the model has {logits.shape[1]} classes: "
                f"they must lie in [0, {logits.shape[1] - 1}]"
            )


def _objective(loss: str) -> Callable[[Tensor, Tensor], Tensor]:
    return LOSSES[choice("loss", loss, LOSSES)]
