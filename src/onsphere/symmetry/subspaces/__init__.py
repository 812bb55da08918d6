"""Subspaces of the symmetries: what is left where norms are held, or some weights do not train."""
