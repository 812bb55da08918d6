r"""FAB: the nearest misclassified point, by projections onto linearized decision boundaries.

With :math:`h(z) = z_t - z_y` for a target class :math:`t`, the boundary near a point :math:`z` is
the plane :math:`h(z) + \langle\nabla h(z), z' - z\rangle = 0`. Let :math:`d_1` and :math:`d_0` be
the least changes, in the norm and inside the box, that bring the current point and the example
:math:`x` onto it. Then

.. math::
    z \leftarrow (1-\alpha)(z + \eta d_1) + \alpha (x + \eta d_0), \qquad
    \alpha = \min\Bigl(\frac{|d_1|}{|d_1| + |d_0|},\ \alpha_{max}\Bigr),

and a point that is misclassified is pulled back to :math:`(1-\beta)x + \beta z`. Nothing here
depends on the scale of the logits or on a radius.

Source: Croce & Hein, 2019 (arXiv 1907.02044).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from onsphere.robustness.attacks.losses import Goal, gain
from onsphere.robustness.attacks.pgd import Model, check_logits, loss_and_gradient
from onsphere.robustness.attacks.target_classes import at_once, nearest_classes
from onsphere.robustness.attacks.threat_model import Norm, Threat, per_example

_MOST_TOWARDS_X = 0.1  # alpha_max
_OVERSHOOT = 1.05  # eta
_BACKWARD = 0.9  # beta
_WINDOW = 20  # steps between two looks at the progress
_NEWTON = 12  # steps; each is exact once no entry meets its bound, and ends early then
_BISECTIONS = 14


def fab(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | None = None,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: int = 9,
    steps: int = 100,
    early_stopping_factor: float | None = None,
    batch_size: int = 256,
) -> Tensor:
    r"""Look for the nearest misclassified point of each example, aiming at the nearest classes.

    This is the targeted form (FAB-T), without random restarts. One evaluation of the model per
    step serves three ends: it decides whether the point is misclassified, and gives value and
    gradient of the plane, also for a point that is then pulled back.

    Args:
        model: a classifier.
        x: inputs, shape ``(batch, ...)``, inside the bounds.
        y: labels, shape ``(batch,)``.
        eps: a distance that suffices: an example leaves once it has a point as near as that.
        norm: in which the change is small, ``"linf"`` or ``"l2"``.
        bounds: least and greatest value of an entry.
        targets: how many of the wrong classes, those with the largest clean logits.
        steps: gradient evaluations per target.
        early_stopping_factor: if given, a target is also left when its distance, falling this many
            times as much as in the last 20 steps, would not come to ``eps``. Asked at steps 40,
            60, ...
        batch_size: pairs of example and target that go through the model at once, if there are more
            pairs than examples.

    Returns:
        The nearest misclassified points found, in the order of ``x``; ``x`` itself where the model
        is wrong already, and where none was found.

    Raises:
        ValueError: as :func:`apgd_targeted`.
        TypeError: as :func:`apgd_targeted`.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([0, 0])
        >>> near = fab(torch.nn.Identity(), x, y)
        >>> (near - x).abs().amax(1)      # half the difference of the two entries
        tensor([0.1000, 0.4000])

    Source: Croce & Hein, 2019 (arXiv 1907.02044), algorithm 1.
    """
    threat = Threat(1.0 if eps is None else eps, norm, bounds)
    for name, count in {"steps": steps, "targets": targets, "batch_size": batch_size}.items():
        if count < 1:
            raise ValueError(f"{name} is at least 1, got {count}")
    threat.check(x, y)
    best = x.detach().clone()
    if not len(x):
        return best
    with torch.no_grad():
        logits = model(best)
    check_logits(logits, y)
    order = nearest_classes(logits, y, targets)
    distance = torch.full_like(logits[:, 0], torch.inf, dtype=x.dtype)
    standing = (logits.argmax(1) == y).nonzero().squeeze(1)
    column = 0
    while column < order.shape[1] and len(standing):
        width = at_once(len(standing), order.shape[1] - column, batch_size)
        rows = standing.repeat_interleave(width)
        aim = order[standing, column : column + width].flatten()
        found, reached = _approach(
            model, x.detach()[rows], y[rows], aim, threat, steps, eps, early_stopping_factor
        )
        nearest, choice = reached.view(-1, width).min(1)
        better = nearest < distance[standing]
        chosen = (torch.arange(len(standing), device=x.device) * width + choice)[better]
        best[standing[better]] = found[chosen]
        distance[standing[better]] = nearest[better]
        if eps is not None:
            standing = standing[distance[standing] > eps]
        column += width
    refine = standing[distance[standing].isfinite()]
    best[refine] = _bisect(model, x.detach()[refine], y[refine], best[refine])
    return best


def _approach(
    model: Model,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    threat: Threat,
    steps: int,
    eps: float | None,
    early_stopping_factor: float | None,
) -> tuple[Tensor, Tensor]:
    """Run FAB for one target per row: the nearest misclassified points, and their distances."""
    rows = torch.arange(len(x), device=x.device)
    best, nearest = x.clone(), torch.full(x.shape[:1], torch.inf, dtype=x.dtype, device=x.device)
    mark = nearest.clone()
    z = x
    for step in range(1, steps + 1):
        gained, wrong, gradient = loss_and_gradient(
            model, z, y, Goal(gain, target), differentiate=True
        )
        assert gradient is not None
        gained = gained.to(z.dtype)  # a model may compute in another precision
        size = threat.distance(z, x)
        better = wrong & (size < nearest[rows])
        best[rows[better]], nearest[rows[better]] = z[better], size[better]
        reached = nearest[rows]
        done = torch.zeros_like(wrong) if eps is None else reached <= eps
        if step % _WINDOW == 0:
            if eps is not None and early_stopping_factor is not None:
                done |= mark.isfinite() & (reached - early_stopping_factor * (mark - reached) > eps)
            mark = reached
        if done.all():
            break
        base = torch.where(per_example(wrong, z), x + _BACKWARD * (z - x), z)
        z = _towards(z, base, x, gained, gradient, threat)
        if done.any():
            keep = ~done
            rows, x, y, z, target, mark = (v[keep] for v in (rows, x, y, z, target, mark))
    return best, nearest


def _towards(
    z: Tensor, base: Tensor, x: Tensor, gained: Tensor, gradient: Tensor, threat: Threat
) -> Tensor:
    """Take one step from ``base``, with the value and the gradient at ``z``."""
    slope = gradient.flatten(1)
    size = slope.abs().amax(1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    slope = slope / size  # so that no product under- or overflows
    offset = -(gained.unsqueeze(1) / size) + (slope * z.flatten(1)).sum(1, keepdim=True)
    points = torch.cat([base.flatten(1), x.flatten(1)])
    planes = torch.cat([slope, slope])
    gap = torch.cat([offset, offset]) - (planes * points).sum(1, keepdim=True)
    change = onto_plane(points, planes, gap, threat)
    steps = threat.distance(change, torch.zeros_like(change)).clamp_min(1e-8)
    near, far = steps.chunk(2)
    share = per_example((near / (near + far)).clamp_max(_MOST_TOWARDS_X), x)
    from_base, from_x = (part.view_as(x) for part in change.chunk(2))
    moved = (1 - share) * (base + _OVERSHOOT * from_base) + share * (x + _OVERSHOOT * from_x)
    return moved.clamp(*threat.bounds)


def onto_plane(
    points: Float[Tensor, "batch n"],
    slope: Float[Tensor, "batch n"],
    gap: Float[Tensor, "batch 1"],
    threat: Threat,
) -> Float[Tensor, "batch n"]:
    r"""Return the least change that reaches a plane and stays in the box.

    It is :math:`d` with :math:`\langle w, d\rangle = g`.
    Its entries are :math:`\pm\min(t u_i, r_i)`, with :math:`r_i` the room up to the bound on the
    side that :math:`w_i` asks for, :math:`u_i = 1` for l-infinity and :math:`|w_i|` for l2. The
    gain :math:`\sum_i |w_i|\min(t u_i, r_i)` is concave and piecewise linear in :math:`t`, so
    Newton's method from the left finds :math:`t` in a few steps, without sorting.

    Args:
        points: in the box.
        slope: :math:`w`.
        gap: :math:`g`. Where the box does not reach the plane, all room is used.
        threat: gives norm and bounds.

    Example:
        >>> import torch
        >>> point, slope = torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, 1.0]])
        >>> onto_plane(point, slope, torch.tensor([[0.4]]), Threat(1.0))   # 0.1 is all the room
        tensor([[0.3000, 0.1000]])
    """
    low, high = threat.bounds
    weight, sign = slope.abs(), slope.sign() * gap.sign()
    room = torch.where(sign > 0, high - points, points - low)
    unit = torch.ones_like(weight) if threat.norm == "linf" else weight
    pull = weight * unit
    wanted = gap.abs()
    total = pull.sum(1, keepdim=True)
    t = wanted / torch.where(total > 0, total, 1.0)
    for _ in range(_NEWTON):
        reach = t * unit
        missing = wanted - (weight * torch.minimum(reach, room)).sum(1, keepdim=True)
        free = (pull * (reach < room)).sum(1, keepdim=True)
        open_ = (missing > 1e-6 * wanted) & (free > 0)
        if not open_.any():
            break
        t = torch.where(open_, t + missing / torch.where(free > 0, free, 1.0), t)
    return sign * torch.minimum(t * unit, room)


@torch.no_grad()
def _bisect(model: Model, x: Tensor, y: Tensor, wrong: Tensor) -> Tensor:
    """Move misclassified points along straight lines towards ``x``, up to the boundary."""
    right, far = x, wrong
    for _ in range(_BISECTIONS if len(x) else 0):
        middle = (right + far) / 2
        fools = per_example(model(middle).argmax(1) != y, x)
        right, far = torch.where(fools, right, middle), torch.where(fools, middle, far)
    return far
