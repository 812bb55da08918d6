"""What adding to weights adds to the tensors that a model computes."""
