"""Qwen2.5-VL on megatron-core: config, M-RoPE, vision tower, language model."""

from megatron_r1reward.models.qwen2_5_vl.config import build_configs
from megatron_r1reward.models.qwen2_5_vl.model import Qwen25VL
from megatron_r1reward.models.qwen2_5_vl.rotary import mrope_positions

__all__ = ["Qwen25VL", "build_configs", "mrope_positions"]
