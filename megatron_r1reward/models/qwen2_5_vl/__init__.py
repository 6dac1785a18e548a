"""Qwen2.5-VL on megatron-core: config, M-RoPE, vision tower, language model, weight table."""
