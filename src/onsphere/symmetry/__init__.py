"""Which weights live on which spheres: units (exact), certificates (numeric), audit."""
