"""What the operations of a model demand of its rows, columns and channels."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from onsphere._torch.execution import OutputPicker, bare_name, inputs_of, weights
from onsphere._torch.materialize import on_gathered
from onsphere.symmetry.channels.components import Solved, solved
from onsphere.symmetry.exact.shifts.unknowns import Unknowns
from onsphere.symmetry.exact.trace import Call, Starts, runs_on
from onsphere.symmetry.exact.units.channel_demands import ChannelDemands
from onsphere.symmetry.exact.units.fields import LARGEST, Fields, Index
from onsphere.symmetry.exact.units.linear_forms import Constraints, Unit

_MOST_STACKED = 2**20
"""Up to how many rows and columns of all experts together each has an unknown of its own."""


@dataclass(frozen=True)
class FollowedChannels:
    """What the operations of a model demand of its weights.

    Args:
        channels: the demands.
        names: of parameters, then of buffers.
        shapes: of these.
        parameters: how many there are of these.
        used: numbers of the weights that operations touched, and that are not inert.
        held: numbers of the weights that nothing may scale.
        beside_eps: units of what stands beside small constants.
        followers: units of buffers that only estimate, with those of what they estimate.
    """

    channels: ChannelDemands
    names: list[str]
    shapes: list[tuple[int, ...]]
    parameters: int
    used: set[int]
    held: set[int]
    beside_eps: list[Unit]
    followers: list[tuple[Unit, Unit]]

    @cached_property
    def solution(self) -> Solved:
        """What the demands leave free."""
        return solved(self.channels)

    @property
    def left_out(self) -> list[str]:
        """Parameters with rows and columns of which too many hang together to be solved."""
        blocks = self.channels.blocks
        starts = np.array([b.start for b in blocks])
        found = {
            blocks[i].weight
            for numbers in self.solution.left_out
            for i in np.unique(np.searchsorted(starts, numbers, "right") - 1)
        }
        return [self.names[k] for k in range(self.parameters) if k in found]


@on_gathered
def followed_channels(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: OutputPicker | None = None,
    inert: Collection[str] = (),
    held: Collection[str] = (),
    others: Sequence[Call] = (),
    roles: Mapping[str, frozenset[str]] | None = None,
    shifts: Unknowns | None = None,
) -> FollowedChannels:
    """Return what the operations demand of rows, columns and channels.

    Args:
        model: any module.
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors that must not change.
        inert: parameters known not to affect the output.
        held: weights that no family may scale.
        others: further inputs that the symmetries must hold for.
        roles: what the model does with its weights, as a trace tells.
        shifts: takes what these runs demand of shifts.
    """
    parameters, buffers = weights(model)
    own, roles = {**parameters, **buffers}, roles or {}
    system = Constraints(len(own))
    channels = ChannelDemands(system, len(own))
    fields: dict[str, Fields] = {}
    convolutions = (m for m in model.modules() if isinstance(m, _ConvNd))
    # Not `m.weight`: where that is computed, reading it can change what it is computed from.
    grouped = {id(m._parameters.get("weight")): m.groups for m in convolutions}
    still = {*inert, *held}
    stacked = _stacked(own, roles)
    for number, (name, tensor) in enumerate(own.items()):
        if bare_name(name) not in still:
            role = roles.get(bare_name(name), frozenset())
            groups = grouped.get(id(tensor), 1)
            shape = tuple(tensor.shape)
            fields[name] = _starting(channels, number, shape, role, groups, name in stacked)
    calls = [Call(*inputs_of(model, args, kwargs)), *others]
    runs = runs_on(
        model, calls, system, output=output, inert=inert, starts=Starts(channels, fields),
        shifts=shifts,
    )  # fmt: skip
    channels.finish()
    beside_eps = [
        site.unit.with_fields(fields)
        for run in runs for site in run.ledger.sites.values()
        for fields in channels.spelled_out(site.unit.fields)
    ]  # fmt: skip
    followers = [
        (buffer, unit.with_fields(channels.replaced(unit.fields)))
        for run in runs for buffer, unit in run.ledger.followers
        if len(buffer.fields.terms) == 1
        and not any(channels.picks.deciding(i).any() for _, i in unit.fields.terms)
    ]  # fmt: skip
    used = {
        k for k, n in enumerate(own)
        if bare_name(n) not in inert and any(run.used(n) for run in runs)
    }  # fmt: skip
    names = [bare_name(n) for n in own]
    shapes = [tuple(t.shape) for t in own.values()]
    still_held = {k for k, n in enumerate(names) if n in held}
    return FollowedChannels(
        channels, names, shapes, len(parameters), used, still_held, beside_eps, followers
    )


def _starting(
    channels: ChannelDemands,
    number: int,
    shape: tuple[int, ...],
    role: frozenset[str],
    groups: int,
    stacked: bool,
) -> Fields:
    """Give a weight an unknown per entry of each of its axes; a filter slides, so it has two.

    In a grouped convolution the second axis holds the channels of one group, and each group has
    its own: an unknown per group and channel. So has each of the experts that are stacked along
    the first axis.
    """
    terms = []
    axes = [a for a, n in enumerate(shape) if n > 1]
    if role & {"convolution", "transposed"} or groups > 1:
        axes = [a for a in axes if a < (3 if stacked else 2)]
    if stacked and len(axes) > 1 and axes[0] == 0:
        terms = [(Fraction(1), _by_expert(channels, number, shape, a)) for a in axes[1:]]
        axes = []
    if groups > 1 and 1 in axes and shape[0] * shape[1] <= LARGEST:
        axes.remove(1)
        terms.append((Fraction(1), _by_group(channels, number, shape, groups)))
    for a in axes:
        own = channels.new(shape[a : a + 1], number, (a,))
        ones = (1,) * (len(shape) - a - 1)
        terms.append((Fraction(1), own.reshape(own.shape + ones)))
    return Fields(tuple(terms))


def _by_group(channels: ChannelDemands, number: int, shape: tuple[int, ...], groups: int) -> Index:
    """Give a weight an unknown per group of its first axis and entry of its second."""
    each, width = shape[0] // groups, shape[1]
    place = np.arange(shape[0] * width).reshape(groups, each, width)
    places = place.transpose(0, 2, 1).reshape(-1, each)
    own = channels.new((groups, width), number, (0, 1), places, groups)
    index = np.repeat(own, each, axis=0)
    return index.reshape(index.shape + (1,) * (len(shape) - 2))


def _by_expert(channels: ChannelDemands, number: int, shape: tuple[int, ...], axis: int) -> Index:
    """Give a weight an unknown per entry of its first axis and of another one."""
    own = channels.new((shape[0], shape[axis]), number, (0, axis), groups=shape[0])
    wide = [n if a in (0, axis) else 1 for a, n in enumerate(shape)]
    return own.reshape(wide)


def _stacked(held: Mapping[str, Tensor], roles: Mapping[str, frozenset[str]]) -> set[str]:
    """Return the weights that hold a part for each expert; none where these are too many.

    A weight of which products take the matrices one by one says how many experts there are. What
    its module, or a module inside, holds of the same length belongs to them as well. A module with
    one such weight alone is a layer of experts, and the module around it holds the others.
    """
    matrices = {
        n: t for n, t in held.items()
        if t.ndim > 2 and "stacked" in roles.get(bare_name(n), frozenset())
    }  # fmt: skip
    if sum(len(t) * sum(t.shape[1:]) for t in matrices.values()) > _MOST_STACKED:
        return set()
    homes = Counter((_module_of(n), len(t)) for n, t in matrices.items())
    mixtures = {(m if count > 1 else _module_of(m), size) for (m, size), count in homes.items()}
    return {
        n for n, t in held.items()
        if t.ndim > 1 and any((m, len(t)) in mixtures for m in _modules_around(n))
    }  # fmt: skip


def _modules_around(name: str) -> list[str]:
    """Return the module that holds a weight, the one around it, and so on up to the model."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in reversed(range(len(parts)))]


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
