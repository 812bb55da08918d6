"""Watch a training: norms and rotations of weights on spheres, against the laws."""
