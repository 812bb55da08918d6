"""QK-norm: queries and keys of attention on spheres, one vector per head."""

import torch
from torch import Tensor, nn

from onsphere.errors import choice
from onsphere.geometry import SphereMap, normalize
from onsphere.norms.activation import ActivationNorm
from onsphere.norms.modules.channels import positive


class QKNorm(nn.Module):
    r"""Normalize queries and keys before attention: :math:`q \mapsto N(q),\; k \mapsto N(k)`.

    Each vector of a head is projected, so scaling the query map (weight and bias) of one head
    changes nothing, nor scaling the key map, and the logits are bounded.

    Args:
        head_dim: length of one vector.
        method: ``"rms"`` (RMSNorm with a gain each for q and k; as in recent language models),
            ``"ln"`` (LayerNorm; ViT-22B) or ``"l2"`` (unit vectors; q is also multiplied by one
            learned scale, and attention must not divide by a root: ``scale=1.0``).
        eps: in the root for ``"rms"`` and ``"ln"``; for ``"l2"`` the least length that divides.
        scale: where the learned scale of ``"l2"`` starts; the paper takes
            :math:`\log_2(L^2 - L)` for sequences of length :math:`L`.

    Shape: ``forward`` takes queries and keys ``(..., head_dim)`` and returns both.

    Raises:
        ValueError: an unknown method; in ``forward``, another length of vectors.

    Example:
        >>> import torch
        >>> q, k = torch.randn(2, 1, 4, 7, 16, generator=torch.Generator().manual_seed(0)).unbind()
        >>> norm = QKNorm(16)
        >>> for a, b in zip(norm(q, k), norm(100 * q, 10 * k)):
        ...     assert torch.allclose(a, b, atol=1e-3)

    Source: Henry et al., *Query-Key Normalization for Transformers*, 2020 (arXiv 2010.04245);
    Dehghani et al., *Scaling Vision Transformers to 22 Billion Parameters*, 2023 (arXiv
    2302.05442), section 2.
    """

    def __init__(
        self, head_dim: int, *, method: str = "rms", eps: float = 1e-6, scale: float = 10.0
    ) -> None:
        super().__init__()
        self.head_dim, self.eps = positive("head_dim", head_dim), eps
        self.method = choice("method", method, ("rms", "ln", "l2"))
        if self.method == "l2":
            self.scale = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.q, self.k = (ActivationNorm(self.method, head_dim, eps=eps) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalized queries and keys."""
        for vectors in (q, k):
            if not vectors.ndim or vectors.shape[-1] != self.head_dim:
                raise ValueError(
                    f"QK-norm expects (..., {self.head_dim}), got shape {tuple(vectors.shape)}"
                )
        if self.method != "l2":
            return self.q(q), self.k(k)
        unit = SphereMap(eps=self.eps, eps_place="clamp")
        return self.scale * normalize(q, unit), normalize(k, unit)

    def extra_repr(self) -> str:
        """Return the options that were chosen."""
        return f"{self.head_dim}, method={self.method!r}, eps={self.eps}"
