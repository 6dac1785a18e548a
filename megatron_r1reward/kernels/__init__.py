"""Numerical kernels: log-probabilities and the StableReinforce loss from vocab-parallel logits or from hidden states."""
