"""Qwen3-VL on megatron-core, dense and mixture of experts: config, interleaved M-RoPE, deepstack."""

from megatron_r1reward.models.qwen3_vl.config import build_configs
from megatron_r1reward.models.qwen3_vl.model import Qwen3VL
from megatron_r1reward.models.qwen3_vl.rotary import positions

__all__ = ["Qwen3VL", "build_configs", "positions"]
