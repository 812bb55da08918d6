"""Thin adapters to trainers; each imports its framework when it is asked for, and not before."""
