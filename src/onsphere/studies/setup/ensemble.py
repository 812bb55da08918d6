"""Training many small networks at once: what a grid of rates, decays and seeds is made of.

A small network leaves most of a core waiting: a step is some hundred calls on little data. An
*ensemble* makes one call for all its members (:mod:`~onsphere.studies.setup.stacked`); each keeps
its own weights, order of the data, rate, decay and scale of the start, and ends as the network
trained alone does, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onsphere.dynamics.recorder import QUANTITIES, measure_step
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim.steps.sphere_step import advance
from onsphere.optim.updates.geodesic import StepOptions, reference_length
from onsphere.optim.updates.torch_optim import sgd_update
from onsphere.optim.updates.types import Family
from onsphere.optim.updates.types import Part as Shard
from onsphere.studies.engine.job import Inputs, Outcome
from onsphere.studies.setup.architectures import architecture
from onsphere.studies.setup.data import Images
from onsphere.studies.setup.stacked import StackedNetworks
from onsphere.studies.setup.training import (
    MEASURED,
    RECORDED,
    Part,
    Training,
    batches,
    decay_of,
    growth_in,
    measure_logits,
    network_for,
    outcome_of,
    rate_at,
    share_at,
    snapshots_after,
    train,
)

AT_ONCE = 8
"""Members of one stack, at most: with more, activations leave the cache."""

_IMAGES_AT_ONCE = 128  # in one pass, where nothing is trained


def train_ensemble(
    members: Sequence[Training], images: Images, *, at_once: int = AT_ONCE
) -> list[Outcome]:
    """Train networks together, and measure each of them.

    Members that differ in nothing but seed, rate, decay, scale of the start and forced growth are
    trained in one stack; others in stacks of their own. Other networks than the small one cannot be
    stacked and are trained alone. A member that diverges leaves the stack and takes no other with
    it.

    Args:
        members: how each network is trained; any mixture.
        images: the data set of all of them.
        at_once: members of one stack, at most.

    Returns:
        One outcome per member, in their order: result and tensors are those of
        :func:`~onsphere.studies.setup.training.train`, to rounding at first. Where training
        amplifies rounding, as it does over some hundred steps, a member and the network trained
        alone are two draws of one distribution.

    Raises:
        ValueError: ``at_once`` is not positive.

    Example:
        >>> from onsphere.studies.setup.data import Source
        >>> rates = [Training("digits", "bn", lr=lr, steps=30, width=4) for lr in (0.01, 0.1)]
        >>> outcomes = train_ensemble(rates, Source("digits").load())
        >>> [outcome.result["steps_done"] for outcome in outcomes]
        [30, 30]
    """
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}")
    alike: dict[Training, list[int]] = {}
    outcomes: dict[int, Outcome] = {}
    for number, member in enumerate(members):
        if is_stackable(member):
            alike.setdefault(_shape(member), []).append(number)
        else:
            outcomes[number] = train(asdict(member), Inputs(images))
    for numbers in alike.values():
        stacks = -(-len(numbers) // at_once)
        for first in range(stacks):  # of equal size, to within one
            own = numbers[first::stacks]
            done = _Ensemble([members[n] for n in own], images).train()
            outcomes.update(zip(own, done, strict=True))
    return [outcomes[number] for number in range(len(members))]


def is_stackable(member: Training) -> bool:
    """Return whether a network can be trained in a stack with others like it."""
    return architecture(member.network).stacks


def _forces_growth(member: Training) -> bool:
    return (member.norm_growth, member.rate_growth) != (1.0, 1.0)


def _shape(member: Training) -> Training:
    """Return what members of one stack have in common."""
    return replace(
        member,
        seed=0,
        lr=0.0,
        weight_decay=0.0,
        decayed="all",
        start_scale=1.0,
        norm_growth=1.0,
        rate_growth=1.0,
    )


class _Ensemble:
    """A stack of networks in training: their state by parameter, members in front.

    Attributes:
        settings: of the members that are left, in the order of the stack.
        numbers: which members these are.
        momenta: momentum by parameter.
        radii: by parameter on spheres, shape ``(members, vectors)``; 0 until a vector is seen.
        reference: their reference lengths, which a relative rate goes by.
        series: by hidden weight, one tensor per step of shape ``(quantities, members, vectors)``;
            of no weight, where nothing is recorded.
        kept: snapshots by member, as names and tensors.
    """

    def __init__(self, members: Sequence[Training], images: Images) -> None:
        self.images, self.settings = images, list(members)
        self.numbers = list(range(len(members)))
        self.stack = StackedNetworks([network_for(one, images) for one in members])
        first, like = members[0], self.stack.like
        hidden = {name: axes for name, (_, axes) in like.hidden_weights().items()}
        self.hidden, self.weights = hidden, {*hidden, "head.weight"}
        self.series: dict[str, list[Tensor]] = {n: [] for n in hidden} if first.record else {}
        self.kept: list[dict[str, Tensor]] = [{} for _ in members]
        of_one: dict[str, Sphere] = {}
        if first.space == "sphere":
            of_one = {name: Sphere(axes, first.radius) for name, axes in hidden.items()}
        if first.head == "sphere":
            of_one["head.weight"] = Sphere()
        values = self.stack.parameters
        if first.objective == "noise":
            values = {name: values[name] for name in hidden}
        self.trained = list(values)
        self.momenta = {n: torch.zeros_like(p) for n, p in values.items()} if first.momentum else {}
        shapes = {name: tuple(values[name].shape[1:]) for name in of_one if name in values}
        self.reference = {n: reference_length((s,), of_one[n]) for n, s in shapes.items()}
        self.radii = {
            name: values[name].new_zeros(len(members), of_one[name].axes.count(shape))
            for name, shape in shapes.items()
        }

    def train(self) -> list[Outcome]:
        """Train to the end and measure; outcomes in the order of the members."""
        order = [batches(len(self.images.train_y), one) for one in self.settings]
        noise = [torch.Generator().manual_seed(one.seed + 2) for one in self.settings]
        losses: list[list[float]] = [[] for _ in self.settings]
        outcomes: dict[int, Outcome] = {}
        for step in range(self.settings[0].steps):
            index = torch.stack([next(order[number]) for number in self.numbers])
            each = self._losses(index, [noise[number] for number in self.numbers])
            found = each.tolist()
            for number, loss in zip(self.numbers, found, strict=True):
                losses[number].append(loss)
            finite = each.detach().isfinite()
            wanted = [self.stack.parameters[name] for name in self.trained]
            # A loss that is no number stays out of the sum; the others do not depend on it.
            slopes = torch.autograd.grad(each[finite].sum(), wanted)
            gradients = dict(zip(self.trained, slopes, strict=True))
            if not bool(finite.all()):
                measured = self._measure()
                for place in (~finite).nonzero().flatten().tolist():
                    number = self.numbers[place]
                    outcomes[number] = self._outcome(place, losses[number], measured[place])
                gradients = {name: slope[finite] for name, slope in gradients.items()}
                self._keep(finite.nonzero().flatten())
                if not self.numbers:
                    break
            self._step(step, gradients)
            self._keep_snapshots(step)
        measured = self._measure() if self.numbers else []
        for place, number in enumerate(self.numbers):
            outcomes[number] = self._outcome(place, losses[number], measured[place])
        return [outcomes[number] for number in range(len(outcomes))]

    def _losses(self, index: Tensor, noise: Sequence[torch.Generator]) -> Tensor:
        """Return each member's loss on its own batch; ``index`` has shape (members, batch)."""
        x, labels = self.images.train_x[index], self.images.train_y[index]
        logits = self.stack(x)
        if self.settings[0].objective == "noise":
            drawn = torch.stack([torch.randn(logits.shape[1:], generator=g) for g in noise])
            return (logits * drawn).sum(2).mean(1)
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return each.view(len(noise), -1).mean(1)

    @torch.no_grad()
    def _step(self, step: int, gradients: dict[str, Tensor]) -> None:
        """Move all weights by their member's rate, and enlarge those whose norm is forced."""
        before = {name: self.stack.parameters[name].clone() for name in self.series}
        hidden = [rate_at(one, step, "hidden") for one in self.settings]
        others = [rate_at(one, step) for one in self.settings]
        parts: tuple[Part, ...] = ("hidden", "head")
        decays = {
            part: torch.tensor([decay_of(one, part) for one in self.settings], dtype=torch.float64)
            for part in parts
        }
        for name, gradient in gradients.items():
            rates = torch.tensor(hidden if name in self.hidden else others, dtype=torch.float64)
            if name in self.radii:
                self._turn(name, gradient, rates, step)
            else:
                decay = decays["hidden" if name in self.hidden else "head"]
                self._move(name, gradient, rates, decay if name in self.weights else None)
        self._record(before, gradients)
        growth = [growth_in(one, step) for one in self.settings]
        if any(factor != 1 for factor in growth):
            self._enlarge(torch.tensor(growth, dtype=torch.float64))

    def _move(self, name: str, gradient: Tensor, rates: Tensor, decays: Tensor | None) -> None:
        """Take a step of plain SGD: v <- m v + g + decay w, w <- w - rate v."""
        weight = self.stack.parameters[name]
        if decays is not None and bool(decays.any()):
            gradient = torch.addcmul(gradient, weight, _over(decays, weight))
        if self.momenta:
            gradient = self.momenta[name].mul_(self.settings[0].momentum).add_(gradient)
        weight.addcmul_(gradient, _over(rates, weight), value=-1)

    def _turn(self, name: str, gradient: Tensor, rates: Tensor, step: int) -> None:
        """Take a step of :class:`~onsphere.optim.SphereSGD`, with one rate per member.

        Vectors lie in memory one behind the other, as rows. The native kernels take one number for
        all rows; a rate per row is computed in PyTorch. Where the step is linear in the gradients,
        these carry their member's rate, and the kernels get what the schedule leaves of it.
        """
        first, radius, weight = self.settings[0], self.radii[name], self.stack.parameters[name]
        rows, sphere = (radius.numel(), -1), Sphere(VectorAxes((0,)))
        by_row = first.lr_mode == "angle"
        lr: float | Tensor
        if by_row:
            lr = rates.repeat_interleave(radius.shape[1])
        else:
            gradient, lr = self._carrying_rates(name, gradient, step), share_at(first, step)
        update = sgd_update(momentum=first.momentum, dampening=0.0, nesterov=False, first=step == 0)
        momentum = self.momenta[name].view(rows) if self.momenta else None
        part = Shard(weight.view(rows), gradient.reshape(rows), momentum, None, update)
        options = StepOptions(lr, first.lr_mode, capturable=by_row)
        advance([Family([part], radius.view(-1), None, self.reference[name])], sphere, options)

    def _carrying_rates(self, name: str, gradient: Tensor, step: int) -> Tensor:
        """Return gradients times their member's rate, the schedule aside, as momentum is, too."""
        part: Part = "hidden" if name in self.hidden else "head"
        now = self._rates(part, step)
        if self.momenta and step and any(_forces_growth(one) for one in self.settings):
            self.momenta[name].mul_(_over(now / self._rates(part, step - 1), gradient))
        return gradient * _over(now, gradient)

    def _rates(self, part: Part, step: int) -> Tensor:
        """Return each member's rate in a step, over the share that the schedule leaves."""
        share = share_at(self.settings[0], step)
        rates = [rate_at(one, step, part) / share for one in self.settings]
        return torch.tensor(rates, dtype=torch.float64)

    def _record(self, before: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """Measure what a step did to every vector of every member."""
        picked = [QUANTITIES.index(quantity) for quantity in RECORDED]
        for name, start in before.items():
            members, vectors = len(start), self.hidden[name].count(start.shape[1:])
            rows = (members * vectors, -1)
            weight, gradient = self.stack.parameters[name].view(rows), gradients[name].reshape(rows)
            found = measure_step(start.view(rows), weight, gradient, 1.0, VectorAxes((0,)))
            self.series[name].append(found[picked].float().view(-1, members, vectors))

    def _keep_snapshots(self, step: int) -> None:
        for place, (number, own) in enumerate(zip(self.numbers, self.settings, strict=True)):
            for name in snapshots_after(own, step):
                state = self.stack.state_dict(place)
                self.kept[number] |= {f"{name}.{key}": value for key, value in state.items()}

    def _enlarge(self, factors: Tensor) -> None:
        """Do what :func:`~onsphere.studies.setup.training.enlarge` does, member by member."""
        for name in self.hidden:
            weight = self.stack.parameters[name]
            weight.mul_(_over(factors, weight))
            self.radii[name].mul_(_over(factors, self.radii[name]))
            if self.momenta:
                self.momenta[name].div_(_over(factors, weight))

    def _keep(self, places: Tensor) -> None:
        """Go on with the members at these places of the stack."""
        self.stack.keep(places)
        self.momenta = {name: value[places] for name, value in self.momenta.items()}
        self.radii = {name: value[places] for name, value in self.radii.items()}
        self.series = {n: [row[:, places] for row in rows] for n, rows in self.series.items()}
        self.settings = [self.settings[place] for place in places.tolist()]
        self.numbers = [self.numbers[place] for place in places.tolist()]

    def _outcome(self, place: int, losses: list[float], measured: dict[str, Any]) -> Outcome:
        """Return the outcome of the member at a place of the stack."""
        outcome = outcome_of(measured, self.stack.state_dict(place), losses)
        outcome.tensors.update(self.kept[self.numbers[place]] | self._recorded(place))
        return outcome

    def _recorded(self, place: int) -> dict[str, Tensor]:
        """Return the series of one member, of shape ``(steps, vectors)`` each."""
        found = {}
        for name, rows in self.series.items():
            vectors = self.hidden[name].count(self.stack.parameters[name].shape[1:])
            none = torch.empty(0, len(RECORDED), vectors)
            own = torch.stack([row[:, place] for row in rows]) if rows else none
            for quantity, values in zip(RECORDED, own.unbind(1), strict=True):
                found[f"series.{name}.{quantity}"] = values
        return found

    @torch.no_grad()
    def _measure(self) -> list[dict[str, Any]]:
        """Return loss and accuracy of every member that is left."""
        self.stack.training = False
        train, test = (
            torch.cat([self.stack(x) for x in torch.split(images, _IMAGES_AT_ONCE)], 1)
            for images in (self.images.train_x[:MEASURED], self.images.test_x)
        )
        self.stack.training = True
        return [
            measure_logits(own, held_out, self.images)
            for own, held_out in zip(train, test, strict=True)
        ]


def _over(numbers: Tensor, values: Tensor) -> Tensor:
    """Lay one number per member out beside its values."""
    return numbers.to(values.dtype).view(-1, *([1] * (values.ndim - 1)))
