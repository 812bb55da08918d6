"""PyTorch's insides: runs with other tensors, wrapped models laid open, layers as they run."""
