"""Weight norms as parametrizations, made from rows of the table.

State dicts are those of ``torch.nn.utils.parametrizations`` where PyTorch has the method:
``original0`` (lengths) and ``original1`` (directions) for weight normalization, ``original`` with
buffers ``_u`` and ``_v`` for spectral normalization. The older names of PyTorch's hooks load too:
``weight_g`` and ``weight_v``; ``weight_orig``, ``weight_u`` and ``weight_v``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from onsphere.geometry import VectorAxes, center, normalize, vector_norm
from onsphere.norms.methods import method as method_of
from onsphere.norms.row import Method

_WARM_UP = 15  # power iterations before the first step, as in PyTorch


class WeightSphere(nn.Module):
    r"""Project each row of a weight: :math:`w = g\,N(v)`, or :math:`N(v)` without a length.

    Args:
        method: weight normalization, centred weight normalization, weight standardization.
        dim: the axis whose entries are the rows (0; 1 for transposed convolutions).
        eps: the method's eps.

    Shape: ``forward`` takes the lengths ``g`` (size 1 on all axes but ``dim``) and the directions
    ``v`` (the weight's shape), or ``v`` alone for methods without a length.

    Raises:
        ValueError: in ``forward``, when a (centred) row is zero and the method has no eps. Looking
            for one waits for the device.

    Note:
        PyTorch's fused ``torch._weight_norm`` is not used: its second derivative is wrong on the
        CPU (PyTorch 2.13: ``gradgradcheck`` fails and ``H w = -g`` is off by 19 % and more), and
        Hessian-vector products are what scale invariance is checked with.
    """

    def __init__(self, method: Method, dim: int = 0, eps: float = 0.0) -> None:
        super().__init__()
        self.method, self.dim, self.eps = method, dim, eps

    def forward(self, first: Tensor, *rest: Tensor) -> Tensor:
        """Return the weight from its length and direction (or its direction alone)."""
        if not rest:
            return self._project(first)
        (direction,) = rest
        return first * self._project(direction)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Split a weight into length and direction, or keep it as the direction."""
        if self.method.affine != "length":
            return weight
        axes = VectorAxes(index=(self.dim,))
        vectors = axes.gather(weight)
        lengths = vector_norm(center(vectors) if self.method.centered else vectors)
        return axes.scatter(
            lengths, [n if a == self.dim else 1 for a, n in enumerate(weight.shape)]
        ), weight

    def _project(self, direction: Tensor) -> Tensor:
        axes = VectorAxes(index=(self.dim,))
        dtype = torch.promote_types(direction.dtype, torch.float32)
        vectors = axes.gather(direction).to(dtype)
        map = self.method.sphere_map(vectors.shape[-1], self.eps)
        return axes.scatter(normalize(vectors, map), direction.shape).to(direction.dtype)


class SpectralSphere(nn.Module):
    r"""Project a matrix onto the spectral sphere: :math:`W/\sigma`, :math:`\sigma = u^T W v`.

    ``u`` and ``v`` follow the leading singular vectors by power iteration, one or more steps per
    forward pass in training mode, none in eval mode. With ``u`` and ``v`` fixed
    :math:`\sigma` still has degree one, so scaling ``W`` changes nothing even before they have
    converged.

    Args:
        method: spectral normalization.
        weight: the weight to start from.
        n_power_iterations: steps per training forward.
        dim: the axis that becomes the rows of the matrix.
        eps: keeps the normalization of ``u`` and ``v`` finite.
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        method: Method,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if n_power_iterations < 1:
            raise ValueError(f"n_power_iterations must be at least 1, got {n_power_iterations}")
        self.method, self.dim, self.eps = method, dim, eps
        self.n_power_iterations = n_power_iterations
        matrix = self._matrix(weight.detach())
        rows, columns = matrix.shape
        u, v = (matrix.new_empty(extent).normal_() for extent in (rows, columns))
        self.register_buffer("_u", F.normalize(u, dim=0, eps=eps))
        self.register_buffer("_v", F.normalize(v, dim=0, eps=eps))
        self._iterate(matrix, _WARM_UP)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight divided by its (estimated) largest singular value."""
        matrix = self._matrix(weight)
        if self.training:
            self._iterate(matrix.detach(), self.n_power_iterations)
        # Clones, so that the next iteration does not change what this backward pass needs.
        sigma = torch.vdot(self._u.clone(), torch.mv(matrix, self._v.clone()))
        return weight / sigma

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Keep the weight as the matrix to be divided."""
        return weight

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.dim, 0).flatten(1)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, steps: int) -> None:
        for _ in range(steps):
            self._u.copy_(F.normalize(torch.mv(matrix, self._v), dim=0, eps=self.eps))
            self._v.copy_(F.normalize(torch.mv(matrix.t(), self._u), dim=0, eps=self.eps))


def parametrize(
    module: nn.Module,
    method: Method | str,
    name: str = "weight",
    *,
    dim: int | None = None,
    eps: float | None = None,
    n_power_iterations: int = 1,
) -> nn.Module:
    """Put a module's weight on the sphere of a weight norm, in place.

    Args:
        module: the layer; any module with a float parameter ``name`` of at least two axes.
        method: a row of the table, or its key.
        name: the parameter to normalize.
        dim: the axis whose entries are the rows; ``None`` takes 1 for transposed convolutions and
            0 for everything else.
        eps: ``None`` takes the method's default.
        n_power_iterations: for spectral normalization.

    Returns:
        The same module. Undo it with ``torch.nn.utils.parametrize.remove_parametrizations``.

    Raises:
        ValueError: an activation method, no such parameter, or a parameter with fewer than two
            axes.

    Example:
        >>> import torch
        >>> layer = parametrize(torch.nn.Linear(3, 2), "cwn")
        >>> bool(layer.weight.sum(1).abs().max() < 1e-6)          # every row is centred
        True
    """
    row = method_of(method) if isinstance(method, str) else method
    if row.normalizes != "weight":
        raise ValueError(f"{row.name} normalizes activations; use onsphere.norms.ActivationNorm")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no parameter {name!r} to normalize")
    if weight.ndim < 2:
        raise ValueError(f"{row.name} needs a weight with rows, {name!r} has {weight.ndim} axes")
    if dim is None:
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        dim = 1 if isinstance(module, transposed) else 0
    dim %= weight.ndim
    projection: nn.Module
    if row.norm == "spectral":
        guard = 1e-12 if eps is None else eps
        projection = SpectralSphere(row, weight, n_power_iterations, dim, guard)
    else:
        projection = WeightSphere(row, dim, (row.eps or 0.0) if eps is None else eps)
    torch_parametrize.register_parametrization(module, name, projection)
    module.register_load_state_dict_pre_hook(_OlderNames(name, row))  # type: ignore[no-untyped-call]
    return module


class _OlderNames:
    """A hook that renames what ``torch.nn.utils.weight_norm`` and ``spectral_norm`` have saved."""

    def __init__(self, name: str, row: Method) -> None:
        stem = f"parametrizations.{name}"
        if row.norm == "spectral":
            self.names = {
                f"{name}_orig": f"{stem}.original",
                f"{name}_u": f"{stem}.0._u",
                f"{name}_v": f"{stem}.0._v",
            }
        elif row.affine == "length":
            self.names = {f"{name}_g": f"{stem}.original0", f"{name}_v": f"{stem}.original1"}
        else:
            self.names = {}

    def __call__(
        self, _: nn.Module, state_dict: dict[str, Tensor], prefix: str, *__: object
    ) -> None:
        if all(prefix + old in state_dict for old in self.names):
            for old, new in self.names.items():
                state_dict[prefix + new] = state_dict.pop(prefix + old)
