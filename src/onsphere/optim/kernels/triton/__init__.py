"""The Triton kernels for CUDA devices."""
