"""StableReinforce in plain torch: pure functions over response tokens, the truth that kernels are tested against."""
