"""The layer spec on Transformer Engine: fused norm and linear layers, fused attention, FP8. CUDA only.

Without Transformer Engine megatron-core replaces its wrappers by mocks that fail much later; the guard here fails at
once.
"""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


def _extensions() -> Any:
    from megatron.core.extensions import transformer_engine as extensions

    if not extensions.HAVE_TE:
        raise ValueError(
            "transformer_impl 'transformer_engine', but Transformer Engine cannot be imported: install the 'gpu' extra "
            "on a machine with CUDA, or use transformer_impl 'local'"
        )
    return extensions


def layer_spec(attn_mask_type: AttnMaskType, *, self_attention: type[SelfAttention] = SelfAttention) -> ModuleSpec:
    """One transformer layer.

    Raises:
        ValueError: Transformer Engine cannot be imported.
    """
    te = _extensions()
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=self_attention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=te.TELayerNormColumnParallelLinear,
                    core_attention=te.TEDotProductAttention,
                    linear_proj=te.TERowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=te.TELayerNormColumnParallelLinear, linear_fc2=te.TERowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def final_norm() -> Any:
    """The norm after the last layer."""
    return _extensions().TENorm
