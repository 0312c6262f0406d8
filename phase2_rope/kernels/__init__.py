"""Kernels of phase 2: rotary embedding in CUDA C++ (rope.cu) and in Triton."""
