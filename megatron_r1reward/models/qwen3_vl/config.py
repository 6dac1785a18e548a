"""megatron-core configurations derived from a Hugging Face Qwen3-VL `config.json`, dense or mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

from megatron_r1reward.config.schema import MoeSection, ParallelSection, PrecisionSection
from megatron_r1reward.parallel.legality import ModelShape, check_layout, split_layers
from megatron_r1reward.parallel.precision import fp8_arguments
from megatron_r1reward.parallel.transformer import (
    check_language_config,
    common_arguments,
    layout_arguments,
    recompute_arguments,
)

HfConfig: TypeAlias = Qwen3VLConfig | Qwen3VLMoeConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfigs:
    """The megatron-core configurations of one model and the Hugging Face one they come from. The deepstack mergers
    share the merger's."""

    hf: HfConfig
    language: TransformerConfig
    vision: TransformerConfig
    merger: TransformerConfig
    parallel: ParallelSection
    transformer_impl: str
    chunk_layers: tuple[int, ...]  # language-model layers of every pipeline chunk, in model order


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


def model_shape(hf: HfConfig, *, whole_experts: bool = False) -> ModelShape:
    """What layouts have to fit. Under expert parallelism experts are whole: tensor parallelism does not cut them."""
    text, vision = hf.text_config, hf.vision_config
    # Multiplications per token and layer; attention scores are small beside them.
    patch = vision.depth * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    attention = 2 * text.hidden_size * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
    is_moe = moe_layers(hf)
    dense = text.intermediate_size * (len(is_moe) - sum(is_moe))
    routed = text.num_experts_per_tok * text.moe_intermediate_size * sum(is_moe) if any(is_moe) else 0
    layer = attention + 3 * text.hidden_size * (dense + routed) / len(is_moe)
    cut = [] if all(is_moe) else [text.intermediate_size]
    cut += [text.moe_intermediate_size] if any(is_moe) and not whole_experts else []
    return ModelShape(
        num_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        vocab_size=text.vocab_size,
        ffn_sizes=tuple(cut),
        vision_num_heads=vision.num_heads,
        vision_ffn_size=vision.intermediate_size,
        vision_layers_per_token=vision.spatial_merge_size**2 * patch / layer,
    )


def _check_model(hf: HfConfig) -> None:
    """ValueError for a Qwen3-VL that this module does not describe."""
    text = hf.text_config
    if text.rope_parameters["rope_type"] != "default":
        raise ValueError(f"rope_type {text.rope_parameters['rope_type']!r} is not supported: only 'default' is")
    if text.attention_bias:
        raise ValueError("attention_bias puts a bias on the attention's output projection too, which is not supported")
    if deepstack_levels(hf) > text.num_hidden_layers:
        raise ValueError(f"{deepstack_levels(hf)} deepstack levels, but only {text.num_hidden_layers} decoder layers")


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


def _expert_arguments(
    hf: HfConfig, parallel: ParallelSection, precision: PrecisionSection, moe: MoeSection
) -> dict[str, Any]:
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
        moe_grouped_gemm=precision.transformer_impl == "transformer_engine",
        moe_router_load_balancing_type=moe.load_balancing,
        moe_aux_loss_coeff=moe.aux_loss_coefficient if moe.load_balancing != "none" else 0.0,
        moe_z_loss_coeff=moe.z_loss_coefficient or None,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
    )


def _fp8_sizes(hf: HfConfig, parallel: ParallelSection) -> dict[str, int]:
    """Inner and outer sizes of this rank's matrix products in a language-model layer."""
    text = hf.text_config
    is_moe, tp = moe_layers(hf), parallel.tensor_model_parallel_size
    heads = text.num_attention_heads + 2 * max(text.num_key_value_heads, tp)
    sizes = {
        "hidden_size": text.hidden_size,
        "attention output per rank": text.num_attention_heads * text.head_dim // tp,
        "query, key and value rows per rank": heads * text.head_dim // tp,
    }
    if any(is_moe):
        sizes["moe_intermediate_size per rank"] = text.moe_intermediate_size // parallel.expert_tensor_parallel_size
    if not all(is_moe):
        sizes["intermediate_size per rank"] = text.intermediate_size // tp
    return sizes


def _language(
    hf: HfConfig,
    shape: ModelShape,
    parallel: ParallelSection,
    dtype: torch.dtype,
    precision: PrecisionSection,
    moe: MoeSection,
) -> TransformerConfig:
    text = hf.text_config
    config = TransformerConfig(
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
        deterministic_mode=precision.deterministic,
        **layout_arguments(shape, parallel, dtype),
        **recompute_arguments(parallel.recompute, parallel.recompute_num_layers),
        **fp8_arguments(precision, parallel, _fp8_sizes(hf, parallel), dtype),
        **_expert_arguments(hf, parallel, precision, moe),
        **common_arguments(dtype),
    )
    check_language_config(config)
    return config


def build_configs(
    hf: HfConfig,
    parallel: ParallelSection,
    dtype: torch.dtype,
    precision: PrecisionSection = PrecisionSection(),  # noqa: B008 (frozen)
    moe: MoeSection = MoeSection(),  # noqa: B008 (frozen)
) -> ModelConfigs:
    """Derive the language, vision and merger configurations.

    Raises:
        ValueError: the layout or the precision does not fit the model.
    """
    _check_model(hf)
    _check_experts(hf, parallel)
    shape = model_shape(hf, whole_experts=parallel.expert_model_parallel_size > 1)
    check_layout(shape, parallel)
    text, vision = hf.text_config, hf.vision_config
    vision_tp = parallel.tensor_model_parallel_size if parallel.vision == "tensor_parallel" else 1
    # The tower never takes part in the language model's pipeline or sequence parallelism: a config of its own says so.
    tower_and_merger = common_arguments(dtype) | dict(
        normalization="LayerNorm",
        gated_linear_unit=False,
        add_bias_linear=True,
        tensor_model_parallel_size=vision_tp,
        deterministic_mode=precision.deterministic,
    )
    tower = TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        ffn_hidden_size=vision.intermediate_size,
        layernorm_epsilon=1e-6,
        activation_func=partial(F.gelu, approximate="tanh"),
        add_qkv_bias=True,
        **(recompute_arguments("full") if parallel.recompute_vision else {}),
        **tower_and_merger,
    )
    merger = TransformerConfig(
        num_layers=1,
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=vision.hidden_size * vision.spatial_merge_size**2,
        num_attention_heads=text.num_attention_heads,  # unused by the merger, but must divide by tp
        activation_func=F.gelu,
        **tower_and_merger,
    )
    return ModelConfigs(
        hf=hf,
        language=_language(hf, shape, parallel, dtype, precision, moe),
        vision=tower,
        merger=merger,
        parallel=parallel,
        transformer_impl=precision.transformer_impl,
        chunk_layers=tuple(split_layers(shape, parallel)),
    )
