"""Checkpoints: Hugging Face folders in and out, distributed training state."""

import megatron_r1reward.parallel  # noqa: F401  (before megatron.core)
