"""The policy loss from vocab-parallel logits. The Triton modules of this package import nothing but triton."""
