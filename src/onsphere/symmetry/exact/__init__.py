"""Dimensional analysis of the executed operations: scaling exponents, rules, and the null space."""
