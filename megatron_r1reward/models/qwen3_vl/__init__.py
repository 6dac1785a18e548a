"""Qwen3-VL on megatron-core, dense and mixture of experts: config, interleaved M-RoPE, deepstack, weight table."""

from megatron_r1reward.models.qwen3_vl.config import build_configs
from megatron_r1reward.models.qwen3_vl.mapping import weight_table
from megatron_r1reward.models.qwen3_vl.model import Qwen3VL
from megatron_r1reward.models.qwen3_vl.rotary import positions

__all__ = ["Qwen3VL", "build_configs", "positions", "weight_table"]
