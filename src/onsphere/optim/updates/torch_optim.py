"""The updates of PyTorch's own AdamW and SGD, as factors of gradient and moments.

Source: the documentation of ``torch.optim.AdamW`` and ``torch.optim.SGD``; Kingma & Ba, *Adam*,
2015 (arXiv 1412.6980), for the bias corrections.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from onsphere.optim.updates.per_coordinate import PerCoordinateUpdate
from onsphere.optim.updates.per_vector import PerVectorUpdate, VectorMoment

SecondMoment = Literal["coordinate", "vector"]
BaseMode = Literal["hard", "rotate"]


@dataclass(frozen=True)
class BaseStep:
    r"""What a step of an optimizer of PyTorch does to vectors that it keeps on spheres.

    Its moments stay its own, in the space around the sphere. With ``"hard"`` a vector goes to
    :math:`q = p - \eta\,(u + \lambda p)` and then to :math:`r q/|q|`; with ``"rotate"`` it turns
    by :math:`\eta` radians towards :math:`-u`. Only the native kernels on the CPU know it; where
    they do not run, the optimizer makes its step itself (:mod:`~onsphere.optim.modes`).

    Attributes:
        lr: :math:`\eta`.
        mode: of the wrapper.
        decay: :math:`\lambda`, in SGD a part of the gradient, in AdamW beside it.
        ascend: maximize instead of minimizing.
    """

    lr: float
    mode: BaseMode
    decay: float = 0.0
    ascend: bool = False


def adamw_update(
    *, betas: tuple[float, float], eps: float, steps: float | Tensor, second_moment: SecondMoment
) -> PerVectorUpdate | PerCoordinateUpdate:
    r"""Return the update of AdamW at step number ``steps``.

    Args:
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\epsilon`.
        steps: the number of this step, from 1; as a tensor it gives corrections that are tensors.
        second_moment: one per ``"coordinate"`` or one per ``"vector"``.

    Example:
        >>> update = adamw_update(betas=(0.9, 0.99), eps=0.0, steps=1, second_moment="vector")
        >>> round(update.kappa, 6), round(update.moment.first, 6)
        (0.1, 0.1)
    """
    beta1, beta2 = betas
    steps = steps.double() if isinstance(steps, Tensor) else steps
    first, second = 1 - beta1**steps, 1 - beta2**steps
    if second_moment == "coordinate":
        return PerCoordinateUpdate(beta1, 1 - beta1, beta2, first, second, eps)
    moment = VectorMoment(beta2, first, second, eps)
    return PerVectorUpdate(beta1, 1 - beta1, 1 - beta1, beta1, moment)


def sgd_update(
    *, momentum: float, dampening: float, nesterov: bool, first: bool
) -> PerVectorUpdate:
    r"""Return the update of SGD as factors of gradient and momentum.

    Args:
        momentum: :math:`\alpha`; 0 keeps no buffer.
        dampening: :math:`\tau`.
        nesterov: look ahead by one step of momentum.
        first: the buffer is new: the gradient enters it without dampening, as in
            ``torch.optim.SGD``.

    Example:
        >>> sgd_update(momentum=0.5, dampening=0.0, nesterov=False, first=False)
        PerVectorUpdate(alpha=0.5, kappa=1.0, along_gradient=1.0, along_momentum=0.5, moment=None)
    """
    kappa = 1.0 if first or momentum == 0 else 1.0 - dampening
    if nesterov:
        return PerVectorUpdate(momentum, kappa, 1.0 + momentum * kappa, momentum * momentum)
    return PerVectorUpdate(momentum, kappa, kappa, momentum)
