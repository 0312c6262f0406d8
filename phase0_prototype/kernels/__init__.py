"""Kernels of phase 0: three ladders in CUDA C++ (access patterns, matrix product, occupancy) with their Triton twins."""
