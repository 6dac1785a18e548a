"""megatron-core configurations derived from a Hugging Face Qwen3-VL `config.json`, dense or mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

from megatron_r1reward.config.schema import MoeSection, ParallelSection

HfConfig: TypeAlias = Qwen3VLConfig | Qwen3VLMoeConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfigs:
    """The megatron-core configurations of one model and the Hugging Face one they come from. The deepstack mergers
    share the merger's."""

    hf: HfConfig
    language: TransformerConfig
    vision: TransformerConfig
    merger: TransformerConfig


def moe_layers(hf: HfConfig) -> list[bool]:
    """For each layer of the language model, whether its MLP is a mixture of experts (upstream's rule)."""
    text = hf.text_config
    if not getattr(text, "num_experts", 0):
        return [False] * text.num_hidden_layers
    return [
        layer not in text.mlp_only_layers and (layer + 1) % text.decoder_sparse_step == 0
        for layer in range(text.num_hidden_layers)
    ]


def deepstack_levels(hf: HfConfig) -> int:
    """How many of the first decoder layers receive vision features after their MLP."""
    return len(hf.vision_config.deepstack_visual_indexes)


def _common(dtype: torch.dtype) -> dict[str, Any]:
    return dict(
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are always overwritten by a checkpoint, but skipping initialization would also skip the
        # tensor-parallel attributes that gradient clipping relies on.
        perform_initialization=True,
        use_cpu_initialization=not torch.cuda.is_available(),
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


def check_layout(hf: HfConfig, parallel: ParallelSection) -> None:
    """ValueError with the nearest fix when the layout does not divide the model or the model is no Qwen3-VL we know."""
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
    if text.rope_parameters["rope_type"] != "default":
        raise ValueError(f"rope_type {text.rope_parameters['rope_type']!r} is not supported: only 'default' is")
    if text.attention_bias:
        raise ValueError("attention_bias puts a bias on the attention's output projection too, which is not supported")
    if deepstack_levels(hf) > text.num_hidden_layers:
        raise ValueError(f"{deepstack_levels(hf)} deepstack levels, but only {text.num_hidden_layers} decoder layers")
    _check_experts(hf, parallel)


def _check_experts(hf: HfConfig, parallel: ParallelSection) -> None:
    ep = parallel.expert_model_parallel_size
    if not any(moe_layers(hf)):
        if ep > 1:
            raise ValueError(f"expert_model_parallel_size {ep}, but the model has no experts: set it to 1")
        return
    experts = hf.text_config.num_experts
    if experts % ep:
        legal = next(n for n in range(ep, 0, -1) if experts % n == 0)
        raise ValueError(
            f"expert_model_parallel_size {ep} does not divide {experts} experts: the nearest legal size is {legal}"
        )
    if hf.text_config.num_experts_per_tok < 2:
        raise ValueError("num_experts_per_tok 1 renormalizes every routing weight to 1: the router would not train")
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ValueError(
            "experts with tensor_model_parallel_size > 1 need sequence_parallel = true: every rank would route all "
            "tokens otherwise"
        )


def _expert_options(hf: HfConfig, parallel: ParallelSection, moe: MoeSection) -> dict[str, Any]:
    """Expert parallelism and router. Empty for a dense model."""
    layers = moe_layers(hf)
    if not any(layers):
        return {}
    text = hf.text_config
    return dict(
        num_moe_experts=text.num_experts,
        moe_layer_freq=[int(is_moe) for is_moe in layers],
        moe_ffn_hidden_size=text.moe_intermediate_size,
        moe_router_topk=text.num_experts_per_tok,
        # softmax over the chosen experts' logits equals upstream's softmax over all, then renormalized
        moe_router_pre_softmax=False,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type=moe.load_balancing,
        moe_aux_loss_coeff=moe.aux_loss_coefficient if moe.load_balancing != "none" else 0.0,
        moe_z_loss_coeff=moe.z_loss_coefficient or None,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # experts are small: whole experts on a rank, tokens travel
    )


def build_configs(
    hf: HfConfig, parallel: ParallelSection, dtype: torch.dtype, moe: MoeSection | None = None
) -> ModelConfigs:
    """Derive the language, vision and merger configurations.

    Raises:
        ValueError: the layout does not divide the model.
    """
    check_layout(hf, parallel)
    text, vision = hf.text_config, hf.vision_config
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    common = _common(dtype)
    language = TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim,
        ffn_hidden_size=text.intermediate_size,
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        qk_layernorm=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=dtype,
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        variable_seq_lengths=pp > 1,  # packed micro-batches differ in length, deepstack rows travel along
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths demands it even without experts
        batch_p2p_comm=False,
        **_expert_options(hf, parallel, moe or MoeSection()),
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
        normalization="LayerNorm",
        gated_linear_unit=False,
        activation_func=partial(F.gelu, approximate="tanh"),
        add_bias_linear=True,
        add_qkv_bias=True,
        tensor_model_parallel_size=tp,
        **common,
    )
    merger = TransformerConfig(
        num_layers=1,
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=vision.hidden_size * vision.spatial_merge_size**2,
        num_attention_heads=text.num_attention_heads,  # unused by the merger, but must divide by tp
        normalization="LayerNorm",
        gated_linear_unit=False,
        activation_func=F.gelu,
        add_bias_linear=True,
        tensor_model_parallel_size=tp,
        **common,
    )
    return ModelConfigs(hf=hf, language=language, vision=tower, merger=merger)
