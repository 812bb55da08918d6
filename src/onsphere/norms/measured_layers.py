"""One small layer ``z = W x + b`` with a method in place, for the table of invariances."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onsphere.norms.activation import ActivationNorm
from onsphere.norms.modules.batch_renorm import BatchRenorm
from onsphere.norms.modules.cosine import CosineLinear
from onsphere.norms.modules.dora import dora
from onsphere.norms.modules.dynamic_tanh import DynamicTanh
from onsphere.norms.modules.evonorm import EvoNormS0
from onsphere.norms.modules.qk_norm import QKNorm
from onsphere.norms.modules.response_norm import GlobalResponseNorm
from onsphere.norms.modules.robust_norm import RobustNorm
from onsphere.norms.modules.switchable_norm import SwitchableNorm
from onsphere.norms.row import Composite, Method
from onsphere.norms.weight import parametrize

BATCH, IN, OUT, SPACE, GROUPS = 6, 5, 12, 7, 3

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(weight, bias, data) -> output``."""


def layer_of(row: Method | Composite, space: int, eps: float) -> Layer:
    """Return the real module or parametrization of a method around a 1x1 convolution.

    Args:
        row: the method.
        space: number of positions.
        eps: in place of the method's own.

    Returns:
        A function of a weight ``(OUT, IN)``, a bias ``(OUT)`` and data ``(BATCH, IN, space)``, in
        float64. Each call starts from a new module's state.
    """
    if isinstance(row, Method) and row.normalizes == "weight":
        conv = parametrize(nn.Conv1d(IN, OUT, 1), row, eps=eps)
        # A direction is scaled while a learned length stays, so it is the parameter to move.
        original = "original1" if row.affine == "length" else "original"
        return _as_function(conv.eval(), f"parametrizations.weight.{original}", "bias")
    if isinstance(row, Method):
        size = (OUT, space) if row.takes_shape else OUT
        groups = GROUPS if row.grouped else None
        norm: nn.Module = ActivationNorm(row, size, num_groups=groups, eps=eps)
    elif row.key == "cos":
        return _as_function(_OverSpace(CosineLinear(IN, OUT, bias=True, eps=eps)))
    elif row.key == "dora":
        return _dora_layer()
    else:
        norm = _COMPOSITE[row.key](space, eps)
    return _as_function(nn.Sequential(nn.Conv1d(IN, OUT, 1), norm), "0.weight", "0.bias")


def _as_function(net: nn.Module, weight: str = "0.weight", bias: str = "0.bias") -> Layer:
    net = net.double()
    shape = net.get_parameter(weight).shape
    buffers = {name: value.clone() for name, value in net.named_buffers()}

    def layer(w: Tensor, b: Tensor, data: Tensor) -> Tensor:
        state = {name: value.clone() for name, value in buffers.items()}
        changed = {**state, weight: w.reshape(shape), bias: b}
        return torch.func.functional_call(net, changed, (data,)).detach()

    return layer


def _dora_layer() -> Layer:
    """Move the direction ``V = W + BA`` by its frozen part, at some update that is not zero."""
    conv = dora(nn.Conv1d(IN, OUT, 1), rank=2).double()
    a, b = (conv.get_parameter(f"parametrizations.weight.0.lora_{name}") for name in "AB")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in (a, b):
            part.copy_(torch.randn(part.shape, generator=generator, dtype=part.dtype))
        moved = b @ a
    layer = _as_function(conv, "parametrizations.weight.original", "bias")
    return lambda weight, bias, data: layer(weight - moved, bias, data)


class _OverSpace(nn.Sequential):
    """A linear layer along the channels of ``(batch, channel, space)``."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[0](x.movedim(1, -1))
        return y.movedim(-1, 1)


class _Queries(nn.Module):
    """The queries of QK-norm, with ``GROUPS`` heads."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm = QKNorm(OUT // GROUPS, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.unflatten(x.movedim(1, -1), -1, (GROUPS, OUT // GROUPS))
        queries: Tensor = self.norm(heads, heads)[0]
        return queries


def _response_norm(_: int, eps: float) -> nn.Module:
    norm = GlobalResponseNorm(OUT, eps=eps)
    nn.init.ones_(norm.weight)  # as it starts, it does nothing
    return norm


_COMPOSITE: dict[str, Callable[[int, float], nn.Module]] = {
    "brn": lambda _, eps: BatchRenorm(OUT, eps=eps),
    "grn": _response_norm,
    "qk": lambda _, eps: _Queries(eps),
    "switch": lambda _, eps: SwitchableNorm(OUT, eps=eps),
    "evo": lambda _, eps: EvoNormS0(OUT, groups=GROUPS, eps=eps),
    "dyt": lambda space, _: DynamicTanh((OUT, space)),
    "lrn": lambda _, __: nn.LocalResponseNorm(5, alpha=1.0),
    "robust": lambda _, eps: RobustNorm(OUT, eps=eps),
}
