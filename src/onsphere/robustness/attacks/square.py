r"""Square: random search over windows of the image, by the model's scores alone.

Each query changes one window of every image and keeps the change where the margin falls. No
gradient is taken, so nothing that hides gradients protects a model from it.

- l-infinity: the window becomes :math:`x \pm \epsilon`, one sign per channel.
- l2: two windows are drawn. The length that both hold, and what is unused of :math:`\epsilon`, is
  put into the first as a bump of two halves of opposite sign, added to what was there; the other
  becomes empty.

The share of the image that a window covers falls in steps from 0.8.

Source: Andriushchenko et al., 2019 (arXiv 1912.00049), algorithms 1 to 3.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onsphere.robustness.attacks.losses import margin
from onsphere.robustness.attacks.pgd import LEFT_BEFORE_GATHER, Model, check_logits
from onsphere.robustness.attacks.threat_model import Norm, Threat, lengths

_FIRST_SHARE = 0.8
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After which queries the share halves."""


def square_attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    queries: int = 5000,
    early_stopping_factor: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Search for misclassified points by changing windows at random.

    Images of a batch share the places of windows, and draw their own signs. An example leaves once
    it is misclassified.

    Args:
        model: a classifier.
        x: images, shape ``(batch, channels, height, width)``, inside the bounds. Inputs of another
            shape are taken for images of one row.
        y: labels, shape ``(batch,)``.
        eps: radius of the ball, in the units of the input.
        norm: ``"linf"`` or ``"l2"``.
        bounds: least and greatest value of an entry.
        queries: of the model, per example. The windows' schedule is that of 10,000, as published.
        early_stopping_factor: if given, an example also leaves when its margin, falling this many
            times as much per doubling of the queries as it did in the last doubling, would not
            reach zero by the end. Asked after 1,000 queries and at every doubling.
        generator: source of windows and signs, on the device of ``x``; torch's global one if not
            given.

    Returns:
        The changed inputs, in the order of ``x``: misclassified, or else of the least margin.

    Raises:
        ValueError: as :func:`fgsm`, or fewer than one query.
        TypeError: as :func:`fgsm`.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([0, 0])
        >>> seeded = torch.Generator().manual_seed(0)
        >>> moved = square_attack(torch.nn.Identity(), x, y, eps=0.25, queries=50, generator=seeded)
        >>> moved.argmax(1)
        tensor([1, 0])

    Source: Andriushchenko et al., 2019 (arXiv 1912.00049).
    """
    threat = Threat(eps, norm, bounds)
    if queries < 1:
        raise ValueError(f"queries is at least 1, got {queries}")
    threat.check(x, y)
    result = x.detach().clone()
    if not x.numel():
        return result
    images = result.clone() if x.ndim == 4 else result.flatten(1)[:, None, None, :].clone()
    search = _Search(model, threat, x.shape[1:], generator)
    state = search.begin(images, y)
    marks = {
        1000 * 2**k
        for k in range(20)
        if 1000 * 2**k < queries and early_stopping_factor is not None
    }
    for query in range(1, queries):
        if query in marks and early_stopping_factor is not None:
            state.stop_early(query, queries, early_stopping_factor)
        elif 2 * query in marks:
            state.before = state.margin.clone()
        left = int(state.done.sum())
        if left >= LEFT_BEFORE_GATHER * len(state.done):
            result[state.rows[state.done]] = state.z[state.done].view(-1, *x.shape[1:])
            state = state.take(~state.done)
        if not len(state.rows):
            return result
        search.query(state, query)
    result[state.rows] = state.z.view(-1, *x.shape[1:])
    return result


def share_of_image(query: int) -> float:
    """Return which share of the image a window covers at a query.

    Example:
        >>> share_of_image(1), share_of_image(11), share_of_image(5000)
        (0.8, 0.4, 0.00625)
    """
    return _FIRST_SHARE / 2 ** sum(query > after for after in _HALVINGS)


class _Window(NamedTuple):
    top: int
    left: int
    height: int
    width: int

    @property
    def part(self) -> tuple[slice, ...]:
        rows = slice(self.top, self.top + self.height)
        return (slice(None), slice(None), rows, slice(self.left, self.left + self.width))


@dataclass
class _State:
    """A search: every field has one entry per example that is still in it."""

    rows: Tensor  # where the example stands in the results
    x: Tensor
    y: Tensor
    z: Tensor
    margin: Tensor
    done: Tensor
    before: Tensor  # the margin when the queries last doubled

    def take(self, keep: Tensor) -> "_State":
        """Return the search of some of the examples."""
        return _State(**{name: value[keep] for name, value in vars(self).items()})

    def stop_early(self, query: int, queries: int, factor: float) -> None:
        """Mark the examples whose margin will not reach zero at ``factor`` times their progress."""
        fall = self.before - self.margin
        self.done |= self.margin > factor * fall * math.log2(queries / query)
        self.before = self.margin.clone()


@dataclass(frozen=True)
class _Search:
    """The model and what it may be asked."""

    model: Model
    threat: Threat
    shape: torch.Size
    generator: torch.Generator | None

    def begin(self, x: Tensor, y: Tensor) -> _State:
        """Ask for the examples themselves, then for the first random change."""
        margin = self.ask(x, y)
        start = self.stripes(x) if self.threat.norm == "linf" else self.tiles(x)
        first = self.ask(start, y)
        wrong = margin < 0
        z = torch.where(wrong[:, None, None, None], x, start)
        rows = torch.arange(len(x), device=x.device)
        margin = torch.where(wrong, margin, first)
        return _State(rows, x, y, z, margin, margin < 0, margin.clone())

    @torch.no_grad()
    def ask(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the margins."""
        logits = self.model(z.reshape(-1, *self.shape))
        check_logits(logits, y)
        return margin(logits, y).to(torch.promote_types(z.dtype, torch.float32))

    def query(self, state: _State, query: int) -> None:
        """Change a window of every image, and undo it where the margin does not fall."""
        if self.threat.norm == "linf":
            self.query_linf(state, query)
        else:
            self.query_l2(state, query)
        state.done |= state.margin < 0

    def query_linf(self, state: _State, query: int) -> None:
        """Set the window to the far or near end of the ball, and the box."""
        part = self.window(state.z, query, 1).part
        old = state.z[part].clone()
        sign = self.signs(state.z, state.z.shape[:2])
        state.z[part] = (state.x[part] + self.threat.eps * sign).clamp(*self.threat.bounds)
        found = self.ask(state.z, state.y)
        kept = found < state.margin
        state.z[part] = torch.where(kept[:, None, None, None], state.z[part], old)
        state.margin = torch.where(kept, found, state.margin)

    def query_l2(self, state: _State, query: int) -> None:
        """Move what two windows hold, and what is unused, into one of them as a bump."""
        change = state.z - state.x
        into, out = self.window(change, query, 3), self.window(change, query, 3)
        unused = (self.threat.eps**2 - lengths(change) ** 2).clamp_min(0)
        both = torch.zeros_like(change, dtype=torch.bool)
        both[into.part] = both[out.part] = True
        held = (change.square() * both).sum((2, 3), keepdim=True)
        bump = self.bump(change, into.height, into.width) * self.signs(change, change.shape[:2])
        fresh = bump + _unit(change[into.part])
        change[out.part] = 0
        change[into.part] = _unit(fresh) * (unused / change.shape[1] + held).sqrt()
        z = self.spread(change, state.x)
        found = self.ask(z, state.y)
        kept = found < state.margin
        state.z = torch.where(kept[:, None, None, None], z, state.z)
        state.margin = torch.where(kept, found, state.margin)

    def spread(self, change: Tensor, x: Tensor) -> Tensor:
        """Give a change the length of the radius, then cut it off at the box."""
        size = lengths(change)
        z = x + change * (self.threat.eps / torch.where(size > 0, size, 1.0))
        return self.threat.project(z, x)

    def stripes(self, x: Tensor) -> Tensor:
        """Move every column of every channel by the radius up or down."""
        sign = self.signs(x, (*x.shape[:2], 1, x.shape[3]))
        return (x + self.threat.eps * sign).clamp(*self.threat.bounds)

    def tiles(self, x: Tensor) -> Tensor:
        """Fill the image with bumps in five rows of five."""
        change = torch.zeros_like(x)
        high, wide = (max(1, n // 5) for n in x.shape[2:])
        for top in range(0, x.shape[2] - high + 1, high):
            for left in range(0, x.shape[3] - wide + 1, wide):
                bump = self.bump(x, high, wide)
                change[_Window(top, left, high, wide).part] = bump * self.signs(x, x.shape[:2])
        return self.spread(change, x)

    def window(self, x: Tensor, query: int, least: int) -> _Window:
        """Draw a window of the size of this query, at least ``least`` wide where that fits."""
        rows, columns = x.shape[2:]
        area = share_of_image(query) * rows * columns
        height = min(max(round(math.sqrt(area)), least), rows)
        width = min(max(round(area / height), least), columns)
        place = torch.rand(2, generator=self.generator, device=x.device).tolist()
        top = int(place[0] * (rows - height + 1))
        return _Window(top, int(place[1] * (columns - width + 1)), height, width)

    def signs(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Draw signs, shaped to multiply ``x``."""
        draws = torch.randint(2, shape, generator=self.generator, device=x.device)
        return (2 * draws - 1).to(x.dtype).reshape(*shape, *[1] * (4 - len(shape)))

    def bump(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return a window of two halves of opposite sign, of length 1, lying or standing."""
        halved = torch.rand((), generator=self.generator, device=x.device) < 0.5
        if height < 2 or (bool(halved) and width > 1):
            return _two_halves(width, height).T.to(x)
        return _two_halves(height, width).to(x)


def _two_halves(height: int, width: int) -> Tensor:
    upper = _pyramid(height // 2, width)
    both = torch.cat([upper, -_pyramid(height - height // 2, width)])
    return both / torch.linalg.vector_norm(both)


def _pyramid(height: int, width: int) -> Tensor:
    r"""Return a pyramid of square rings: :math:`\sum_{j>m}^{n+1} 1/j^2` at the ring m."""
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns[None, :])
    steps = 1 / torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** 2
    return steps.flip(0).cumsum(0).flip(0)[ring]


def _unit(window: Tensor) -> Tensor:
    """Scale every channel of a window to length 1; an empty one stays empty."""
    size = torch.linalg.vector_norm(window, dim=(2, 3), keepdim=True)
    return window / torch.where(size > 0, size, 1.0)
