"""Folding of normalization: what may be moved where, tried on numbers."""
