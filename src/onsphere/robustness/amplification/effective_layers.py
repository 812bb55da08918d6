r"""Effective layers: a linear map together with the normalization that its output goes to.

The norm of a weight before a normalization is bookkeeping: the normalization divides by it. What
the two together do to a perturbation is not. For BatchNorm in evaluation mode the effective layer
of channel :math:`c` is the linear map :math:`\gamma_c w_c/\sqrt{\sigma_c^2+\epsilon}`; for
normalizations that look at the example (LayerNorm, GroupNorm, InstanceNorm, RMSNorm) it is the
Jacobian at that example.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onsphere.norms import ActivationNorm
from onsphere.robustness.amplification.layer_trace import Call
from onsphere.robustness.amplification.singular_values import Layer, is_affine, spectral_norm

NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm of every dimension
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    ActivationNorm,
)
"""Normalizations that are taken together with the linear map before them."""


@dataclass(frozen=True)
class Effective:
    """One effective layer, at some examples.

    Args:
        start: number of the call whose input it takes.
        end: number of the call whose output it gives; ``start`` without a normalization.
        through: name of the normalization; empty without.
        affine: whether it is the same linear map at every example.
        singular: its largest singular value, per example where it was taken (one if affine).
        vectors: the right singular vectors.
    """

    start: int
    end: int
    through: str
    affine: bool
    singular: Float[Tensor, "batch"]
    vectors: Float[Tensor, "known *shape"]


def effective_layers(
    calls: Sequence[Call], inputs: Sequence[Tensor], *, n_power_iterations: int = 100
) -> list[Effective]:
    """Find the effective layers of a passage, each with its largest singular value.

    A layer counts as linear when it has weights and *is* an affine map of its one input, whatever
    its class. A normalization belongs to it when it runs next and takes its output unchanged.

    Args:
        calls: the layers in the order in which they ran.
        inputs: what each was given, a few examples.
        n_power_iterations: the most steps of power iteration.

    Returns:
        One entry per linear layer.
    """
    found: list[Effective] = []
    for i, (call, given) in enumerate(zip(calls, inputs, strict=True)):
        norm = _norm_after(calls, i)
        layer: Layer = call.module if norm is None else nn.Sequential(call.module, norm.module)
        if found and found[-1].end == i:
            continue  # a normalization that was taken with the layer before it
        if not _is_linear(call, given[:1]):
            continue
        affine = norm is None or is_affine(layer, given[:1])
        at = given[:1] if affine else given
        try:
            singular, vectors = spectral_norm(layer, at, n_power_iterations=n_power_iterations)
        except (RuntimeError, ValueError):  # cannot be differentiated (twice)
            continue
        end, through = (i, "") if norm is None else (i + 1, norm.label)
        found.append(Effective(i, end, through, affine, singular, vectors))
    return found


def weight_norm(module: nn.Module) -> float | None:
    """Return the Euclidean norm of a layer's largest weight, as it is stored; ``None`` without.

    For a weight normalization this is the direction that is trained, whose length does nothing.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> _ = nn.init.ones_(layer.weight)
        >>> weight_norm(layer)
        4.0
    """
    own = [p.detach() for p in module.parameters() if p.is_floating_point() and p.numel()]
    if not own:
        return None
    return float(torch.linalg.vector_norm(max(own, key=torch.numel), dtype=torch.float64))


def _is_linear(call: Call, given: Tensor) -> bool:
    if not call.alone or weight_norm(call.module) is None:
        return False
    try:
        return is_affine(call.module, given)
    except RuntimeError:  # does not take these numbers
        return False


def _norm_after(calls: Sequence[Call], i: int) -> Call | None:
    """Return the normalization that takes the output of a layer as it is."""
    if i + 1 == len(calls):
        return None
    after = calls[i + 1]
    takes = after.follows and after.alone and isinstance(after.module, NORMS)
    return after if takes and not isinstance(calls[i].module, NORMS) else None
