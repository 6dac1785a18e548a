"""Hugging Face folders and distributed checkpoints, each made from the other and compared, without holding a model."""
