"""Kernels that phase 2 starts from."""
