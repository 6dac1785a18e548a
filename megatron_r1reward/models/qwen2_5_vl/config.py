"""megatron-core configurations derived from a Hugging Face Qwen2.5-VL `config.json`: one source, no per-size copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Qwen2_5_VLConfig

from megatron_r1reward.config.schema import ParallelSection


@dataclass(frozen=True, kw_only=True)
class ModelConfigs:
    """The three megatron-core configurations of one model and the Hugging Face one they come from."""

    hf: Qwen2_5_VLConfig
    language: TransformerConfig
    vision: TransformerConfig
    merger: TransformerConfig


def _common(dtype: torch.dtype) -> dict[str, Any]:
    on_cpu = not torch.cuda.is_available()
    return dict(
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are always overwritten by a checkpoint, but skipping initialization would also skip the
        # tensor-parallel attributes that gradient clipping relies on.
        perform_initialization=True,
        use_cpu_initialization=on_cpu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        calculate_per_token_loss=True,  # losses are sums; one division by the global count
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,  # wrong for M-RoPE
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def check_layout(hf: Qwen2_5_VLConfig, parallel: ParallelSection) -> None:
    """ValueError with the nearest fix when a tensor- or pipeline-parallel size does not divide the model."""
    text, vision = hf.text_config, hf.vision_config
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    divisible = {
        "num_attention_heads": text.num_attention_heads,
        "intermediate_size": text.intermediate_size,
        "vocab_size": text.vocab_size,
        "vision num_heads": vision.num_heads,
        "vision intermediate_size": vision.intermediate_size,
    }
    for name, size in divisible.items():
        if size % tp:
            legal = [n for n in range(tp, 0, -1) if all(s % n == 0 for s in divisible.values())]
            raise ValueError(
                f"tensor_model_parallel_size {tp} does not divide {name} {size}: the nearest legal size is {legal[0]}"
            )
    groups = text.num_key_value_heads
    if groups % tp and tp % groups:
        raise ValueError(f"tensor_model_parallel_size {tp} and num_key_value_heads {groups}: one must divide the other")
    if text.num_hidden_layers % pp:
        raise ValueError(f"pipeline_model_parallel_size {pp} does not divide {text.num_hidden_layers} layers")


def build_configs(hf: Qwen2_5_VLConfig, parallel: ParallelSection, dtype: torch.dtype) -> ModelConfigs:
    """Derive the language, vision and merger configurations.

    Raises:
        ValueError: the layout does not divide the model.
    """
    check_layout(hf, parallel)
    text, vision = hf.text_config, hf.vision_config
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    common = _common(dtype)
    gated = dict(gated_linear_unit=True, activation_func=F.silu, normalization="RMSNorm")
    language = TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        ffn_hidden_size=text.intermediate_size,
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=True,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=dtype,
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        variable_seq_lengths=pp > 1,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths demands it even without experts
        batch_p2p_comm=False,
        **gated,
        **common,
    )
    # The tower never takes part in the language model's pipeline or sequence parallelism: a config of its own says so.
    tower = TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        ffn_hidden_size=vision.intermediate_size,
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        add_qkv_bias=True,
        tensor_model_parallel_size=tp,
        **gated,
        **common,
    )
    merger = TransformerConfig(
        num_layers=1,
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=vision.hidden_size * vision.spatial_merge_size**2,
        num_attention_heads=text.num_attention_heads,  # unused by the merger, but must divide by tp
        gated_linear_unit=False,
        activation_func=F.gelu,
        add_bias_linear=True,
        tensor_model_parallel_size=tp,
        **common,
    )
    return ModelConfigs(hf=hf, language=language, vision=tower, merger=merger)
