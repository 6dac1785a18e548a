"""Nodes, GPUs and job steps: which layouts a model allows, which component runs where, and what Slurm says about it."""
