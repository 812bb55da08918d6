"""The C kernels: source, and the library that is built from it."""
