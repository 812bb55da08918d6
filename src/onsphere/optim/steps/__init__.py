"""One step of many tensors: of weights on spheres, of ordinary ones, and back to the spheres."""
