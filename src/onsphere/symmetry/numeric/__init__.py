"""Claims on the numbers: runs in float64, radial derivatives, certificates."""
