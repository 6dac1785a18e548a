"""megatron-core configurations derived from a Hugging Face Qwen3-VL `config.json`, dense or mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

from megatron_r1reward.cluster.legality import check_layout, split_layers
from megatron_r1reward.config.schema import MoeSection, ParallelSection, PrecisionSection
from megatron_r1reward.model_folder.shape import ModelShape, TextShape, read_shape
from megatron_r1reward.parallel.precision import fp8_arguments
from megatron_r1reward.parallel.transformer import (
    check_language_config,
    common_arguments,
    layout_arguments,
    recompute_arguments,
    scale_rotations,
)

HfConfig: TypeAlias = Qwen3VLConfig | Qwen3VLMoeConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfigs:
    """The megatron-core configurations of one model and the Hugging Face one they come from. The deepstack mergers
    share the merger's."""

    hf: HfConfig
    shape: ModelShape
    language: TransformerConfig
    vision: TransformerConfig
    merger: TransformerConfig
    parallel: ParallelSection
    transformer_impl: str
    chunk_layers: tuple[int, ...]  # language-model layers of every pipeline chunk, in model order


def _expert_arguments(
    text: TextShape, parallel: ParallelSection, precision: PrecisionSection, moe: MoeSection
) -> dict[str, Any]:
    """Expert parallelism and router. Empty for a dense model."""
    if text.experts is None or not text.sparse_layers:
        return {}
    return dict(
        num_moe_experts=text.experts.count,
        moe_layer_freq=[int(text.is_sparse(layer)) for layer in range(text.layers)],
        moe_ffn_hidden_size=text.experts.ffn,
        moe_router_topk=text.experts.top_k,
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


def _fp8_sizes(text: TextShape, parallel: ParallelSection) -> dict[str, int]:
    """Inner and outer sizes of this rank's matrix products in a language-model layer."""
    tp = parallel.tensor_model_parallel_size
    heads = text.heads + 2 * max(text.groups, tp)
    sizes = {
        "hidden_size": text.hidden,
        "attention output per rank": text.query // tp,
        "query, key and value rows per rank": heads * text.head_dim // tp,
    }
    if text.experts is not None and text.sparse_layers:
        sizes["moe_intermediate_size per rank"] = text.experts.ffn // parallel.expert_tensor_parallel_size
    if text.sparse_layers < text.layers:
        sizes["intermediate_size per rank"] = text.ffn // tp
    return sizes


def _language(
    shape: ModelShape,
    parallel: ParallelSection,
    dtype: torch.dtype,
    precision: PrecisionSection,
    moe: MoeSection,
) -> TransformerConfig:
    text = shape.text
    config = TransformerConfig(
        num_layers=text.layers,
        hidden_size=text.hidden,
        num_attention_heads=text.heads,
        num_query_groups=text.groups,
        kv_channels=text.head_dim,
        ffn_hidden_size=text.ffn,
        layernorm_epsilon=text.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        qk_layernorm=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        mrope_section=list(text.rope.sections),
        deterministic_mode=precision.deterministic,
        **layout_arguments(shape, parallel, dtype),
        **recompute_arguments(parallel.recompute, parallel.recompute_num_layers),
        **fp8_arguments(precision, parallel, _fp8_sizes(text, parallel), dtype),
        **_expert_arguments(text, parallel, precision, moe),
        **common_arguments(dtype),
    )
    scale_rotations(config, text.rope)
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
    shape = read_shape(hf.to_dict())
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
        shape=shape,
        language=_language(shape, parallel, dtype, precision, moe),
        vision=tower,
        merger=merger,
        parallel=parallel,
        transformer_impl=precision.transformer_impl,
        chunk_layers=tuple(split_layers(shape, parallel)),
    )
