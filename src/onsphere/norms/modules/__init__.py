"""Normalizations that are more than one projection, or none, each with a module of its own."""
