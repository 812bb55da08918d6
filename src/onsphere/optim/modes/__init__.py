"""What :func:`~onsphere.optim.on_sphere` does with the step of another optimizer."""
