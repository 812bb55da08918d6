"""onsphere: normalization, seen on the sphere."""

from onsphere.version import __version__

__all__ = ["__version__"]
