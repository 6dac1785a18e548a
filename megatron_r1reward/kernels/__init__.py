"""Numerical kernels: log-probabilities and the StableReinforce loss from logits or from hidden states."""
