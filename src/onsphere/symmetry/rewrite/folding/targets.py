"""Slices of weights that a fold multiplies, and what is known of the model around them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from onsphere.symmetry.claims import Family
from onsphere.symmetry.rewrite.folding.linear_maps import LinearMap

State = dict[str, Tensor]
"""Weights and buffers in float64, by name."""


@dataclass(frozen=True, eq=False)
class Target:
    """Slices of a weight that are multiplied by the factor of a channel each.

    Args:
        name: the weight.
        axes: along which it is cut.
        index: places along these axes, flattened: a row per channel.
        channels: which channel each row belongs to.
    """

    name: str
    axes: tuple[int, ...]
    index: Tensor
    channels: Tensor

    def factors(self, by_channel: Tensor, shape: Sequence[int]) -> Tensor:
        """Return what to multiply the weight with."""
        return self._placed(by_channel, torch.ones, shape)

    def terms(self, by_channel: Tensor, shape: Sequence[int]) -> Tensor:
        """Return what to add to the weight."""
        return self._placed(by_channel, torch.zeros, shape)

    def _placed(self, by_channel: Tensor, start: object, shape: Sequence[int]) -> Tensor:
        wide = [n if a in self.axes else 1 for a, n in enumerate(shape)]
        made: Tensor = start(wide, dtype=torch.float64, device=by_channel.device)  # type: ignore[operator]
        flat = made.reshape(-1)
        values = by_channel[self.channels][:, None].expand(self.index.shape)
        flat[self.index.reshape(-1)] = values.reshape(-1)
        return flat.reshape(wide)


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a model.

    Args:
        model: the module.
        families: its families of scale symmetries.
        maps: weight -> the linear maps that have it.
        state: its weights and buffers in float64.
        takes_bias: whether maps may get a bias that their class makes no place for in a file.
        offsets: gain -> what is added to the stored numbers.
    """

    model: nn.Module
    families: Sequence[Family]
    maps: Mapping[str, Sequence[LinearMap]]
    state: Mapping[str, Tensor]
    takes_bias: bool
    offsets: Mapping[str, float] = field(default_factory=dict)

    def gives_bias(self, one: LinearMap) -> bool:
        """Return whether a map has a bias or may get one."""
        return one.has_bias or (self.takes_bias and one.can_have_bias)

    @property
    def biases(self) -> set[str]:
        """Names of the biases of all maps, whether they are there or not."""
        return {m.bias for maps in self.maps.values() for m in maps}


Normal = Callable[[Tensor], Tensor]
"""Draws normal numbers of the shape of a tensor."""


def listed(names: Sequence[str]) -> str:
    """Return names in a line, the first three of many."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
