r"""The largest singular value of a layer, from its own forward pass and nothing else.

A layer is a function of one input. Its Jacobian :math:`J` at a point is applied by automatic
differentiation, so that strides, padding, groups and whatever else the layer does are those of the
real layer on a real input, and no matrix is ever built.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from onsphere.robustness.attacks.threat_model import lengths, per_example

Layer = Callable[[Tensor], Tensor]


def spectral_norm(
    layer: Layer,
    x: Float[Tensor, "batch *shape"],
    *,
    n_power_iterations: int = 100,
    tolerance: float = 1e-5,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch *shape"]]:
    r"""Return the largest singular value of a layer's Jacobian, and its right singular vector.

    Power iteration :math:`v \leftarrow J^T J v / |J^T J v|` from a random start, for every example
    by itself. The value is :math:`|Jv|` for the returned unit vector, so it is never above the
    true one; it stops where :math:`J^T J v` is :math:`|Jv|^2 v` to ``tolerance``, or after
    ``n_power_iterations`` steps. Where the largest singular values lie close together the value is
    right long before the vector is.

    :math:`J^T u` is linear in :math:`u`, and :math:`Jv` is its derivative: both come from one
    forward pass.

    Args:
        layer: maps inputs to outputs, each example by itself; not changed, nor are its gradients.
        x: where the Jacobian is taken; for an affine layer any point gives the same.
        n_power_iterations: the most steps.
        tolerance: relative residual of the eigenvalue equation at which to stop.
        generator: source of the starting vectors; seeded with 0 if not given.

    Returns:
        The value per example, and unit vectors of the shape of ``x``. A Jacobian of 0 gives 0,
        and some unit vector.

    Raises:
        ValueError: the layer's output does not depend differentiably on its input.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> value, vector = spectral_norm(layer, torch.zeros(1, 2))
        >>> round(float(value), 4), [round(abs(float(x)), 4) for x in vector[0]]
        (3.0, [1.0, 0.0])
    """
    push, pull = jacobian(layer, x)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    v = v / lengths(v)
    for _ in range(n_power_iterations):
        back = pull(push(v))
        size = lengths(back)
        aligned = per_example((back * v).flatten(1).sum(1), v)  # |Jv|², the Rayleigh quotient
        residual = lengths(back - aligned * v)
        v = torch.where(size > 0, back / size.clamp_min(TINY), v)
        if bool((residual <= tolerance * aligned).all()):
            break
    return lengths(push(v)).flatten(), v


TINY = 1e-30
"""Stands in for the length of a zero vector where it is divided by."""


def jacobian(
    layer: Layer, at: Float[Tensor, "batch *shape"]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the products of a layer's Jacobian, and of its transpose, with a vector.

    Args:
        layer: maps inputs to outputs.
        at: where.

    Returns:
        Two functions: of vectors like the input, and of vectors like the output.

    Raises:
        ValueError: the output does not depend differentiably on the input.

    Example:
        >>> import torch
        >>> push, pull = jacobian(torch.nn.Flatten(), torch.zeros(1, 2, 2))
        >>> push(torch.ones(1, 2, 2)).shape, pull(torch.ones(1, 4)).shape
        (torch.Size([1, 4]), torch.Size([1, 2, 2]))
    """
    with torch.enable_grad():
        point = at.detach().clone().requires_grad_()
        made = layer(point)
        if not made.requires_grad:
            raise ValueError("the layer's output does not depend differentiably on its input")
        cotangent = torch.zeros_like(made).requires_grad_()
        (pulled,) = torch.autograd.grad(made, point, cotangent, create_graph=True)

    def push(v: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, cotangent, v, retain_graph=True)[0].detach()

    def pull(u: Tensor) -> Tensor:
        return torch.autograd.grad(made, point, u, retain_graph=True)[0].detach()

    return push, pull


@torch.no_grad()
def is_affine(layer: Layer, at: Float[Tensor, "batch *shape"]) -> bool:
    """Say whether a layer is an affine map, by trying.

    With ``g = f - f(0)``: ``g(u + v) = g(u) + g(v)`` and ``g(-u) = -g(u)`` for random ``u, v``, to
    a thousandth, or what the precision of short numbers leaves.

    Args:
        layer: maps inputs to outputs.
        at: a point that has the size and shape of its inputs; one or two examples do.

    Example:
        >>> import torch
        >>> is_affine(torch.nn.Linear(3, 2), torch.ones(1, 3))
        True
        >>> is_affine(torch.nn.ReLU(), torch.ones(1, 3))
        False
    """
    generator = torch.Generator().manual_seed(0)
    size = float(at.abs().max()) or 1.0

    def drawn() -> Tensor:
        return size * torch.randn(at.shape, generator=generator, dtype=at.dtype).to(at.device)

    u, v = drawn(), drawn()
    none = layer(torch.zeros_like(at)).double()
    one, other, both, back = (layer(w).double() - none for w in (u.clone(), v, u + v, -u))
    off = torch.stack([(both - one - other).norm(), (back + one).norm()]).amax()
    allowed = max(1e-3, 16 * torch.finfo(at.dtype).eps)
    return bool(off <= allowed * one.norm())
