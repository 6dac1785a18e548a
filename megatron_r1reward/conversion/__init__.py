"""Hugging Face folders and distributed checkpoints, each made from the other and compared, without holding a model."""

import megatron_r1reward.parallel  # noqa: F401  (before megatron.core)
