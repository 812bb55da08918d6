"""onsphere: normalization, seen on the sphere.

>>> import onsphere as osp
>>> osp.norms.method("bn").name
'BatchNorm'
"""

from onsphere import dynamics, geometry, norms, optim, robustness
from onsphere.version import __version__

__all__ = ["__version__", "dynamics", "geometry", "norms", "optim", "robustness"]
