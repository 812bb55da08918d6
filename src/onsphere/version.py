"""The version of onsphere, in one place."""

__version__ = "0.1.0"
