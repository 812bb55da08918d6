"""A run as page, terminal, table and scalars of TensorBoard."""
