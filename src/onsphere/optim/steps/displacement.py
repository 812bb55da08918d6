"""What an optimizer adds to weights, read without the weights in the way.

The difference of a weight before and after a step says little of the update where the step is small
beside the weight: in bfloat16 most of it is rounding. An update that does not depend on the weight
is the same from any point, so a base optimizer may take its step from zero: what lies there
afterwards *is* the update, to rounding of its own size, and weight decay has added nothing.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

# The size of an update may depend on the weights (Adafactor), its direction may not; nor may the
# state hold weights (ASGD).
_FREE = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.Adamax, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop),
    *(torch.optim.Rprop, torch.optim.Adafactor, torch.optim.Muon, torch.optim.LBFGS),
)


def steps_from_anywhere(optimizer: torch_optimizer.Optimizer) -> bool:
    """Whether the direction of an optimizer's update does not depend on the weights.

    Known of those of PyTorch, decay apart; another class says so by ``steps_from_anywhere = True``.

    Example:
        >>> steps_from_anywhere(torch.optim.SGD([torch.ones(1)]))
        True
    """
    return type(optimizer) in _FREE or getattr(optimizer, "steps_from_anywhere", False)


class Buffers:
    """Zeros like weights, kept from step to step, as long as they are known to be zero."""

    def __init__(self) -> None:
        self._held: dict[Tensor, Tensor] = {}

    def forget(self, params: Iterable[Tensor]) -> None:
        """Zero the buffers of some weights: not all of what they held was used up."""
        held = [self._held[param] for param in params if param in self._held]
        if held:
            torch._foreach_zero_(held)

    def drop(self, params: Iterable[Tensor]) -> None:
        """Give the memory for some weights free: their updates are known in another way."""
        for param in params if self._held else ():
            self._held.pop(param, None)

    def take(self, param: Tensor) -> Tensor:
        """Hand out the zeros for a weight; they are its owner's until given back."""
        held = self._held.pop(param, None)
        if held is None or not _alike(held, param):
            return torch.zeros_like(param.detach())
        return held

    def give_back(self, param: Tensor, zeros: Tensor) -> None:
        """Keep zeros for the next step."""
        self._held[param] = zeros


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())


class Displacements:
    """Zeros in the place of weights, and what an optimizer makes of them.

    The weights themselves wait elsewhere. Where a tensor owns its memory, the two change places;
    what is spread over processes, or has gaps, is copied.

    Args:
        params: the weights.
        buffers: zeros for each. What lies in one after :meth:`arrive` has to be used up (zero
            again) or forgotten.
    """

    def __init__(self, params: Sequence[Tensor], buffers: Buffers) -> None:
        self.params = list(params)
        self._swapped = [_owns(param) for param in self.params]
        self._starts = [self._take(i) for i in range(len(self.params))]
        self._moved: list[Tensor] = []
        self._buffers = buffers
        for param, swapped in zip(self.params, self._swapped, strict=True):
            if swapped:
                param.data = buffers.take(param)
            else:
                param.detach().zero_()

    def visit(self) -> None:
        """Put the weights as they are by now in their place, for a closure."""
        self._moved = [self._take(i) for i in range(len(self.params))]
        for i, (start, moved) in enumerate(zip(self._starts, self._moved, strict=True)):
            self._put(i, start + moved)

    def leave(self) -> None:
        """Put the displacements back, after :meth:`visit`."""
        for i, moved in enumerate(self._moved):
            self._put(i, moved)

    def arrive(self) -> dict[Tensor, Tensor]:
        """Put the weights back where they started; return what was added to each."""
        found = {param: self._take(i) for i, param in enumerate(self.params)}
        for i, start in enumerate(self._starts):
            self._put(i, start)
            if self._swapped[i]:
                self._buffers.give_back(self.params[i], found[self.params[i]])
        return found

    def _take(self, i: int) -> Tensor:
        held = self.params[i]
        return held.data if self._swapped[i] else held.detach().clone()

    def _put(self, i: int, x: Tensor) -> None:
        if self._swapped[i]:
            self.params[i].data = x
        else:
            self.params[i].detach().copy_(x)


def _owns(param: Tensor) -> bool:
    """Whether a tensor may change places with another of its kind."""
    if type(param) not in (Tensor, torch.nn.Parameter):
        return False
    return (
        param.is_contiguous() or torch.empty_like(param, device="meta").stride() == param.stride()
    )
