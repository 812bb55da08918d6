"""Linear maps of PyTorch and of libraries: where their outputs, inputs and bias are."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onsphere._torch.execution import bare_name

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_PLAIN: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A module that is one linear map and a bias.

    Args:
        path: of the module.
        module: the module.
        weight: name of its weight.
        bias: name of its bias, whether there is one or not.
        rows: the axis of the weight that belongs to outputs (within a group, if transposed).
        columns: the axis that belongs to inputs (within a group, unless transposed).
        groups: of a convolution.
    """

    path: str
    module: nn.Module
    weight: str
    bias: str
    rows: int
    columns: int
    groups: int = 1

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias."""
        return getattr(self.module, self.bias.rpartition(".")[2], None) is not None

    @property
    def can_have_bias(self) -> bool:
        """Whether there is a bias, or its class takes one that is set later."""
        return self.has_bias or any(
            isinstance(self.module, c) and type(self.module).forward is c.forward for c in _PLAIN
        )

    @property
    def outputs(self) -> int:
        """How many outputs there are."""
        weight: Tensor = getattr(self.module, self.weight.rpartition(".")[2])
        return weight.shape[self.rows] * (self.groups if self.transposed else 1)

    @property
    def outputs_along(self) -> int:
        """The axis of the weight along which outputs lie, if one of them has them all."""
        depthwise = self.transposed and self.groups > 1
        return self.columns if depthwise else self.rows

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return isinstance(self.module, Transposed)

    @property
    def pads_with_zeros(self) -> bool:
        """Whether it meets zeros beside its input, as convolutions do at borders."""
        m = self.module
        if not isinstance(m, Convolution) or m.padding_mode != "zeros":
            return False
        return (m.padding == "same" and max(m.kernel_size) > 1) or (
            m.padding not in ("same", "valid") and any(m.padding)
        )  # fmt: skip

    def of_constant(self, weight: Tensor, shift: Tensor) -> Tensor | None:
        """Return what the map makes of an input that is constant over space, without its bias.

        Args:
            weight: of the map.
            shift: one number per input.

        Returns:
            One number per output; ``None`` where it is not the same everywhere, or the number of
            inputs is another one.
        """
        if self.transposed or self.pads_with_zeros:
            return None
        matrix = weight.movedim((self.rows, self.columns), (0, 1))
        matrix = matrix.reshape(*matrix.shape[:2], -1).sum(2)
        if shift.numel() != matrix.shape[1] * self.groups:
            return None
        by_group = matrix.reshape(self.groups, -1, matrix.shape[1])
        return torch.einsum("goi,gi->go", by_group, shift.reshape(self.groups, -1)).reshape(-1)


def linear_maps(model: nn.Module) -> dict[str, list[LinearMap]]:
    """Return for each weight the linear maps whose weight it is: several where it is shared."""
    names = {id(p): bare_name(n) for n, p in [*model.named_parameters(), *model.named_buffers()]}
    found: dict[str, list[LinearMap]] = {}
    for path, module in model.named_modules():
        for one in _maps_of(bare_name(path), module, names):
            found.setdefault(one.weight, []).append(one)
    return found


def _maps_of(path: str, module: nn.Module, names: Mapping[int, str]) -> list[LinearMap]:
    dot = f"{path}." if path else ""
    weight = module._parameters.get("weight")
    own = names.get(id(weight), f"{dot}weight")
    bias = names.get(id(module._parameters.get("bias")), f"{dot}bias")
    if isinstance(module, nn.MultiheadAttention):
        some = module._parameters.get("in_proj_weight")
        if some is None:
            return []
        return [
            LinearMap(path, module, names.get(id(some), ""), f"{dot}in_proj_bias", 0, 1)
        ]  # the output map is a module of its own
    if weight is None:
        return []
    if isinstance(module, Transposed):
        return [LinearMap(path, module, own, bias, 1, 0, module.groups)]
    if isinstance(module, Convolution):
        return [LinearMap(path, module, own, bias, 0, 1, module.groups)]
    if isinstance(module, nn.Linear):
        return [LinearMap(path, module, own, bias, 0, 1)]
    if type(module).__name__ == "Conv1D" and weight.ndim == 2:  # GPT-2's: inputs come first
        return [LinearMap(path, module, own, bias, 1, 0)]
    return []
