"""Kernels of phase 0: ladders in CUDA C++ (access patterns, matrix product, occupancy), each with a Triton twin."""
