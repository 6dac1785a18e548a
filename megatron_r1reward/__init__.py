"""Megatron-based training of multimodal generative reward models with StableReinforce."""

__version__ = "0.1.0"
