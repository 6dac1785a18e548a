"""megatron-core `TransformerConfig` arguments of a layout, and the combinations that must never reach it.

megatron-core accepts some combinations that give wrong numbers without an error. They are refused here, so that a later
edit of the arguments cannot bring them back.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1reward.cluster.legality import pipeline_layout
from megatron_r1reward.config.schema import ParallelSection
from megatron_r1reward.model_folder.shape import ModelShape, Rope
from megatron_r1reward.parallel import cpu


def common_arguments(dtype: torch.dtype) -> dict[str, Any]:
    """What every part of every family has in common: no dropout, sums as losses, no fusion that changes numbers."""
    return dict(
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are always overwritten by a checkpoint, but skipping initialization would also skip the
        # tensor-parallel attributes that gradient clipping relies on.
        perform_initialization=True,
        use_cpu_initialization=cpu.DEVICE.type == "cpu" and not torch.cuda.is_available(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        calculate_per_token_loss=True,  # losses are sums; one division by the global count
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,  # wrong for M-RoPE
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,  # casts the gradient of the logits to bf16
        persist_layer_norm=False,
    )


def layout_arguments(shape: ModelShape, parallel: ParallelSection, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the language model's `TransformerConfig`."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    return dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(shape, parallel) if pp > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.context_parallel_comm,
        pipeline_dtype=dtype,
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        variable_seq_lengths=pp > 1,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths demands it even without experts
        batch_p2p_comm=False,
        overlap_p2p_comm=virtual > 1,
        deallocate_pipeline_outputs=pp > 1,
    )


def scale_rotations(config: TransformerConfig, rope: Rope) -> None:
    """YaRN multiplies sines and cosines by 0.1 ln(factor) + 1. megatron-core's attention does that where the
    configuration has this attribute, which is no field of it."""
    if rope.yarn is not None:
        config.yarn_rotary_scaling_factor = rope.yarn.factor


def recompute_arguments(granularity: str, num_layers: int = 1) -> dict[str, Any]:
    """Activation recomputation; selective recomputes the core attention only."""
    if granularity == "none":
        return {}
    if granularity == "selective":
        return dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=num_layers)


def check_language_config(config: TransformerConfig) -> None:
    """Refuse what runs without an error and trains something else.

    Raises:
        ValueError: naming the combination.
    """
    virtual = config.virtual_pipeline_model_parallel_size
    if virtual is not None and config.batch_p2p_comm:
        raise ValueError("batch_p2p_comm pairs the wrong chunks of an interleaved schedule on two stages: set it false")
    if virtual is not None and config.variable_seq_lengths and not config.overlap_p2p_comm:
        raise ValueError("an interleaved schedule exchanges shapes of unequal micro-batches only with overlap_p2p_comm")
    if config.fp8 and not config.transformer_impl == "transformer_engine":
        raise ValueError("fp8 is ignored by local layers: set precision.transformer_impl to 'transformer_engine'")
    if config.cross_entropy_loss_fusion:
        raise ValueError("cross_entropy_loss_fusion rounds the gradient of the logits to bf16: leave it off")
    if not config.perform_initialization:
        raise ValueError("perform_initialization=False leaves weights without their tensor-parallel attributes")
    if not config.calculate_per_token_loss:
        raise ValueError("losses are sums over tokens, divided once: calculate_per_token_loss has to be true")
