"""How much each layer amplifies a perturbation of the input."""
