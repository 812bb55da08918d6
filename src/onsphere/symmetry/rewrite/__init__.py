"""The same function from other weights: canonical ones, rescaled ones."""
