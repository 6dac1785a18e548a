"""Nodes, GPUs and job steps: which component runs where, and what Slurm says about it."""
