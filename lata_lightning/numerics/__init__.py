"""Arithmetic on tensors: chunks, low-rank factors, compiled kernels, the measuring and the merging pass."""
