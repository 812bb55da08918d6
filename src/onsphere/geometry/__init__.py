"""The lemma: centring, spheres, tangents, Jacobians. Pure functions of tensors."""

from onsphere.geometry.projection import (
    Spectrum,
    SphereMap,
    center,
    jacobian,
    jvp,
    normalize,
    spectrum,
    vjp,
)
from onsphere.geometry.sphere import (
    angle,
    distance,
    exp,
    length,
    log,
    retract,
    tangent,
    to_sphere,
    transport,
)
from onsphere.geometry.vectors import Sphere, VectorAxes

__all__ = [
    "Spectrum",
    "Sphere",
    "SphereMap",
    "VectorAxes",
    "angle",
    "center",
    "distance",
    "exp",
    "jacobian",
    "jvp",
    "length",
    "log",
    "normalize",
    "retract",
    "spectrum",
    "tangent",
    "to_sphere",
    "transport",
    "vjp",
]
