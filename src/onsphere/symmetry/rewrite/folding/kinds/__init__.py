"""What folds: BatchNorm, gains, shifts, centring, parametrizations, weights made in forward."""
