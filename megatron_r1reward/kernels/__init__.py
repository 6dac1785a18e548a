"""Numerical kernels: the LM head fused with log-probabilities."""
