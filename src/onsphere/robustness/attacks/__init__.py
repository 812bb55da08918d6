"""Attacks on classifiers: what they may do, what they maximize, how they search."""
