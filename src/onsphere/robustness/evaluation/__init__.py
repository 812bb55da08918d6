"""Robust accuracy by several attacks, and checks that gradients were not masked."""
