"""Weights that can move together without changing the function: affine families of shifts."""
