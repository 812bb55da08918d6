r"""What the eps of a normalization leaves of a gradient's radial part."""

from jaxtyping import Float
from torch import Tensor


def eps_residual(
    variance: Float[Tensor, "*channels"],
    gain: Float[Tensor, "*channels"],
    gain_gradient: Float[Tensor, "*channels"],
    eps: float,
) -> Float[Tensor, "*channels"]:
    r"""Return the radial part of a filter's gradient that the eps of BatchNorm leaves.

    .. math:: \langle w_c, g_c\rangle
              = \frac{\epsilon}{\sigma_c^2 + \epsilon}\,
                \gamma_c\,\frac{\partial L}{\partial\gamma_c}.

    With :math:`\epsilon = 0` the gradient is tangent. A filter whose pre-activations have a
    variance near :math:`\epsilon` is not on a sphere. Exact, in training mode.

    Args:
        variance: :math:`\sigma_c^2` of the batch, biased.
        gain: :math:`\gamma_c`.
        gain_gradient: its gradient.
        eps: :math:`\epsilon`.

    Returns:
        One inner product per channel.

    Example:
        >>> import torch
        >>> one = torch.ones(1)
        >>> eps_residual(3 * one, one, 2 * one, eps=1.0)
        tensor([0.5000])
    """
    return eps / (variance + eps) * gain * gain_gradient
