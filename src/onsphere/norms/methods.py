r"""Every normalization as one row of one table.

A method says what it normalizes, which axes form one vector, whether vectors are centred, onto
which sphere they go, where eps stands, where its statistics come from and what learned gain and
shift follow. Modules, parametrizations, the study's networks and the table of invariances are all
made from these rows; adding a method is adding a row.

Layouts: activations are ``(batch, channel, *space)``, weights ``(out, in, *kernel)``.
"""

import math
from dataclasses import dataclass
from typing import Literal

from onsphere.errors import nearest
from onsphere.geometry import SphereMap, VectorAxes
from onsphere.geometry.projection import EpsPlace

Role = Literal["batch", "channel", "space", "out", "in", "kernel"]
Unit = Literal["filter", "group", "layer"]
Shift = Literal["bias", "layer rows", "group rows", "row entries"]


@dataclass(frozen=True)
class Method:
    r"""One normalization method.

    Args:
        key: short name, as on the command line.
        name: the name in the field.
        normalizes: the tensor that is projected.
        inside: roles of the axes that run inside one vector; the others enumerate vectors.
        grouped: channels are cut into groups, one vector per group.
        centered: the mean of each vector is subtracted first.
        norm: Euclidean length, or largest singular value.
        radius: ``"sqrt(n)"`` when the length is a root mean square, else ``"1"``.
        eps: PyTorch's default (the published one where PyTorch lacks the method); ``None`` is the
            machine epsilon of the dtype; 0 where the method divides by the bare length.
        eps_place: inside the root of the mean square, or added outside it.
        statistics: ``"batch"`` statistics, replaced by running ones in eval mode; ``"power
            iteration"``; or ``"none"`` beyond the vector itself.
        affine: shape of the learned gain and shift: per ``"channel"``, per ``"element"`` of the
            vector, a ``"length"`` per row, or ``"none"``.
        shift: whether a learned shift comes with the gain.
        scale_unit: the finest part of the layer's weight that can be scaled without changing the
            function (theory: which weights live on spheres), at eps = 0.
        scale_with_bias: the layer's bias must be scaled along with the weight.
        shifts: the shifts that change nothing. ``"bias"``: each entry of the bias;
            ``"layer rows"``: ``W + 1 v^T`` with ``b + c 1``; ``"group rows"``: the same per group;
            ``"row entries"``: ``w + c 1`` within each row.
        source: paper and PyTorch name.
    """

    key: str
    name: str
    normalizes: Literal["activation", "weight"]
    inside: tuple[Role, ...]
    centered: bool
    radius: Literal["sqrt(n)", "1"]
    eps: float | None
    affine: Literal["channel", "element", "length", "none"]
    scale_unit: Unit
    source: str
    grouped: bool = False
    norm: Literal["l2", "spectral"] = "l2"
    eps_place: EpsPlace = "inside"
    statistics: Literal["none", "batch", "power iteration"] = "none"
    shift: bool = False
    scale_with_bias: bool = False
    shifts: tuple[Shift, ...] = ()

    def vector_axes(
        self, ndim: int, num_groups: int = 1, trailing: int | None = None
    ) -> VectorAxes:
        """Which axes of the normalized tensor form one vector.

        Args:
            ndim: number of axes of the tensor.
            num_groups: number of channel groups, for a grouped method.
            trailing: for methods that normalize whole samples, how many trailing axes form the
                vector (PyTorch's ``normalized_shape``); all but the first when ``None``.

        Returns:
            The axes, for a tensor in this file's layout.
        """
        if trailing is not None and self.inside == ("channel", "space"):
            return VectorAxes(index=tuple(range(ndim - trailing)))
        head: tuple[Role, Role]
        tail: Role
        head, tail = (
            (("batch", "channel"), "space")
            if self.normalizes == "activation"
            else (("out", "in"), "kernel")
        )
        roles: list[Role] = [*head, *([tail] * (ndim - 2))][:ndim]
        index = tuple(axis for axis, role in enumerate(roles) if role not in self.inside)
        return VectorAxes(index, pieces=((1, num_groups),) if self.grouped else ())

    def weight_axes(self, num_groups: int = 1) -> VectorAxes:
        """Which parts of the layer's weight ``(out, in, *kernel)`` live on a sphere each."""
        if self.scale_unit == "filter":
            return VectorAxes(index=(0,))
        if self.scale_unit == "group":
            return VectorAxes(pieces=((0, num_groups),))
        return VectorAxes()

    def sphere_map(self, n: int, eps: float) -> SphereMap:
        r"""Express the method in the lemma's units.

        Args:
            n: entries of one vector.
            eps: the method's eps. Inside the root it is added to the *mean* square, so the lemma,
                which adds to the squared length, sees :math:`n\,\epsilon`; outside,
                :math:`\sqrt n\,\epsilon`.

        Returns:
            The projection for vectors of ``n`` entries.
        """
        square = n if self.radius == "sqrt(n)" else 1
        scaled = eps * (square if self.eps_place == "inside" else math.sqrt(square))
        return SphereMap(self.centered, math.sqrt(square), self.norm, scaled, self.eps_place)


_ROWS = (
    Method(
        key="bn",
        name="BatchNorm",
        normalizes="activation",
        inside=("batch", "space"),
        centered=True,
        radius="sqrt(n)",
        eps=1e-5,
        statistics="batch",
        affine="channel",
        shift=True,
        scale_unit="filter",
        shifts=("bias",),
        source="Ioffe & Szegedy 2015, arXiv 1502.03167; torch.nn.BatchNorm2d",
    ),
    Method(
        key="ln",
        name="LayerNorm",
        normalizes="activation",
        inside=("channel", "space"),
        centered=True,
        radius="sqrt(n)",
        eps=1e-5,
        affine="element",
        shift=True,
        scale_unit="layer",
        scale_with_bias=True,
        shifts=("layer rows",),
        source="Ba et al. 2016, arXiv 1607.06450; torch.nn.LayerNorm",
    ),
    Method(
        key="in",
        name="InstanceNorm",
        normalizes="activation",
        inside=("space",),
        centered=True,
        radius="sqrt(n)",
        eps=1e-5,
        affine="channel",
        shift=True,
        scale_unit="filter",
        shifts=("bias",),
        source="Ulyanov et al. 2016, arXiv 1607.08022; torch.nn.InstanceNorm2d",
    ),
    Method(
        key="gn",
        name="GroupNorm",
        normalizes="activation",
        inside=("channel", "space"),
        grouped=True,
        centered=True,
        radius="sqrt(n)",
        eps=1e-5,
        affine="channel",
        shift=True,
        scale_unit="group",
        scale_with_bias=True,
        shifts=("group rows",),
        source="Wu & He 2018, arXiv 1803.08494; torch.nn.GroupNorm",
    ),
    Method(
        key="rms",
        name="RMSNorm",
        normalizes="activation",
        inside=("channel", "space"),
        centered=False,
        radius="sqrt(n)",
        eps=None,
        affine="element",
        scale_unit="layer",
        scale_with_bias=True,
        source="Zhang & Sennrich 2019, arXiv 1910.07467; torch.nn.RMSNorm",
    ),
    Method(
        key="wn",
        name="weight normalization",
        normalizes="weight",
        inside=("in", "kernel"),
        centered=False,
        radius="1",
        eps=0.0,
        affine="length",
        scale_unit="filter",
        source="Salimans & Kingma 2016, arXiv 1602.07868; torch parametrizations.weight_norm",
    ),
    Method(
        key="cwn",
        name="centred weight normalization",
        normalizes="weight",
        inside=("in", "kernel"),
        centered=True,
        radius="1",
        eps=0.0,
        affine="length",
        scale_unit="filter",
        shifts=("row entries",),
        source="Huang et al. 2017, ICCV, Centered Weight Normalization",
    ),
    Method(
        key="ws",
        name="weight standardization",
        normalizes="weight",
        inside=("in", "kernel"),
        centered=True,
        radius="sqrt(n)",
        eps=1e-5,
        affine="none",
        scale_unit="filter",
        shifts=("row entries",),
        source="Qiao et al. 2019, arXiv 1903.10520",
    ),
    Method(
        key="sn",
        name="spectral normalization",
        normalizes="weight",
        inside=("out", "in", "kernel"),
        centered=False,
        norm="spectral",
        radius="1",
        eps=0.0,
        statistics="power iteration",
        affine="none",
        scale_unit="layer",
        source="Miyato et al. 2018, arXiv 1802.05957; torch parametrizations.spectral_norm",
    ),
)

METHODS: dict[str, Method] = {row.key: row for row in _ROWS}
"""Every method by its key, in the order of the table."""


def method(key: str) -> Method:
    """Look a method up.

    Args:
        key: a key of :data:`METHODS`.

    Returns:
        Its row.

    Raises:
        ValueError: there is no such method; the message lists those there are.

    Example:
        >>> method("gn").name
        'GroupNorm'
    """
    try:
        return METHODS[key.lower()]
    except (KeyError, AttributeError):
        hint = nearest(str(key), list(METHODS))
        raise ValueError(f"unknown normalization method {key!r}{hint}") from None
