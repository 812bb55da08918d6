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
    expmap,
    logmap,
    retract,
    tangent,
    to_sphere,
    transport,
    vector_norm,
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
    "expmap",
    "jacobian",
    "jvp",
    "logmap",
    "normalize",
    "retract",
    "spectrum",
    "tangent",
    "to_sphere",
    "transport",
    "vector_norm",
    "vjp",
]
