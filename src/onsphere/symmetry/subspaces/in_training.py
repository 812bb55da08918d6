"""Which parts of weights training can rescale: by channel, and all channels of a part alike.

What does not train (buffers, frozen weights) must stay as it is. Any combination of symmetries that
leaves it alone is one of each channel by itself and one that scales all channels of a kind alike,
so both are looked for, and nothing else is needed.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction

from onsphere.symmetry.claims import Family
from onsphere.symmetry.subspaces.channel_kinds import Block, channel_kinds
from onsphere.symmetry.subspaces.held_vectors import without
from onsphere.symmetry.subspaces.held_wholes import UniformSymmetries


def moved_in_training(
    families: Sequence[Family],
    wholes: Sequence[Mapping[str, Fraction]],
    shapes: Mapping[str, Sequence[int]],
    still: Collection[str],
) -> Iterator[Block]:
    """Yield the parts of weights that some symmetry moves while what does not train stays.

    Args:
        families: symmetries by channel.
        wholes: those of whole weights.
        shapes: of the weights.
        still: weights and buffers that do not train.

    Yields:
        Blocks; one without axes stands for a whole weight.

    Example:
        >>> import torch
        >>> from onsphere.symmetry.claims import Slices
        >>> half, one = torch.arange(2)[:, None], Fraction(1)
        >>> into = Slices("fused", one, (0,), half), Slices("frozen", -one, (1,), half)
        >>> whole = {"frozen": one, "out": -one}
        >>> shapes = {"fused": (4, 3), "frozen": (5, 2), "out": (3, 5)}
        >>> moved = moved_in_training([Family(into, 2)], [whole], shapes, ["frozen"])
        >>> [(b.name, b.axes, b.index.reshape(-1).tolist()) for b in moved]
        [('fused', (0,), [0, 1]), ('out', (), [0])]
    """
    kinds = channel_kinds(families)
    for kind in kinds:
        moved = dict.fromkeys(b for v in without(kind, still).symmetries for b in v)
        yield from (kind.blocks[b] for b in moved)
    yield from UniformSymmetries(kinds, wholes, shapes, still).moved()
