"""Kernels of our own for CPUs: some C++, compiled on the machine that runs it, once per shape (docs/design/0023)."""
