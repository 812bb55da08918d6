"""What a row of the table of normalizations says.

A :class:`Method` is one projection onto a sphere, and everything is made from its fields. What
is several projections, or none, is a :class:`Composite`: it has a module of its own, and says
why it is no row of the first kind.

Layouts: activations are ``(batch, channel, *space)``, weights ``(out, in, *kernel)``.
"""

import math
from dataclasses import dataclass
from typing import Literal

from onsphere.geometry import SphereMap, VectorAxes
from onsphere.geometry.projection import EpsPlace, Length

Role = Literal["batch", "channel", "space", "out", "in", "kernel"]
Unit = Literal["filter", "group", "layer"]
Shift = Literal["bias", "layer rows", "group rows", "row entries", "layer bias"]


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
        norm: Euclidean length, sum of absolute values, or largest singular value.
        radius: ``"sqrt(n)"`` when the length is a root mean square; ``"n sqrt(2/pi)"`` when it is
            :math:`\sqrt{\pi/2}` times the mean absolute value, which estimates the same of
            normally distributed entries; else ``"1"``.
        eps: PyTorch's default (the published one where PyTorch lacks the method); ``None`` is the
            machine epsilon of the dtype; 0 where the method divides by the bare length.
        eps_place: inside the root of the mean square, or added outside it.
        statistics: ``"batch"`` statistics, replaced by running ones in eval mode; ``"power
            iteration"``; or ``"none"`` beyond the vector itself.
        affine: shape of the learned gain and shift: per ``"channel"``, per ``"element"`` of the
            vector, one ``"scalar"`` that starts at :math:`\sqrt n`, a ``"length"`` per row, or
            ``"none"``.
        shift: whether a learned shift comes with the gain.
        scale_unit: the finest part of the layer's weight that can be scaled without changing the
            function (theory: which weights live on spheres), at eps = 0.
        scale_with_bias: the layer's bias must be scaled along with the weight.
        shifts: the shifts that change nothing. ``"bias"``: each entry of the bias;
            ``"layer rows"``: ``W + 1 v^T`` with ``b + c 1``; ``"group rows"``: the same per group;
            ``"row entries"``: ``w + c 1`` within each row; ``"layer bias"``: ``b + c 1``.
        source: paper and PyTorch name.
    """

    key: str
    name: str
    normalizes: Literal["activation", "weight"]
    inside: tuple[Role, ...]
    centered: bool
    radius: Literal["sqrt(n)", "n sqrt(2/pi)", "1"]
    eps: float | None
    affine: Literal["channel", "element", "scalar", "length", "none"]
    scale_unit: Unit
    source: str
    grouped: bool = False
    norm: Length = "l2"
    eps_place: EpsPlace = "inside"
    statistics: Literal["none", "batch", "power iteration"] = "none"
    shift: bool = False
    scale_with_bias: bool = False
    shifts: tuple[Shift, ...] = ()

    @property
    def takes_shape(self) -> bool:
        """Whether it normalizes whole samples, so that its size is their trailing shape."""
        return self.inside == ("channel", "space") and not self.grouped

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
        if trailing is not None and self.takes_shape:
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
                which adds to the squared length, sees :math:`n\,\epsilon`; outside it is added to
                the length over the radius, so the lemma sees :math:`r\,\epsilon`.

        Returns:
            The projection for vectors of ``n`` entries.
        """
        radii = {"1": 1.0, "sqrt(n)": math.sqrt(n), "n sqrt(2/pi)": n * math.sqrt(2 / math.pi)}
        radius = radii[self.radius]
        inside = n if self.radius == "sqrt(n)" else 1
        scaled = eps * (inside if self.eps_place == "inside" else radius)
        return SphereMap(self.centered, radius, self.norm, scaled, self.eps_place)


@dataclass(frozen=True)
class Composite:
    r"""One method that is several projections, or none, with a module of its own.

    Args:
        key: short name, as in :data:`onsphere.norms.TABLE`.
        name: the name in the field.
        module: where its implementation is.
        scale_unit: as in :class:`Method`; ``"none"`` where no part of the weight can be scaled
            alone.
        why: what kind of thing it is instead of one projection, and where there is no sphere, why.
        source: paper.
        eps: default of the module; 0 where nothing keeps from a division by zero.
        scale_with_bias: the layer's bias must be scaled along with the weight.
        shifts: the shifts that change nothing, as in :class:`Method`.
        needs_space: whether its statistics run over space.
    """

    key: str
    name: str
    module: str
    scale_unit: Unit | Literal["none"]
    why: str
    source: str
    eps: float = 0.0
    scale_with_bias: bool = False
    shifts: tuple[Shift, ...] = ()
    needs_space: bool = False
