"""Layer specs: which modules a megatron-core transformer layer is made of.

`local` uses megatron-core's own layers and works on any device. Two leaves have no such implementation in 0.16.1 and
come from here: the norm (`WrappedTorchNorm` refuses sequence parallelism) and the core attention
(`DotProductAttention` refuses packed sequences). Checkpoint names are those of the Transformer Engine spec,
so checkpoints move between the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn.attention.bias import causal_lower_right

from megatron_r1reward.parallel.context import ContextSplit


class TorchNorm:
    """RMSNorm or LayerNorm whose parameters take part in the sequence-parallel gradient all-reduce.

    Called like `TENorm`; returns a plain torch module.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> torch.nn.Module:  # type: ignore[misc]
        kind = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


@dataclass
class PackedRow(PackedSeqParams):
    """megatron-core's description of packed sequences (THD), with their bounds as numbers on the host: what is read
    from the device in a layer makes the host wait for it, layer by layer."""

    bounds: tuple[int, ...] = ()  # S + 1
    gathered_order: torch.Tensor | None = None  # under context parallelism: see `ContextSplit`


def packed(cu_seqlens: torch.Tensor, bounds: Sequence[int], split: ContextSplit | None = None) -> PackedRow:
    """THD parameters for self-attention; cu_seqlens int32 [S + 1] on the device, `bounds` the same on the host."""
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=tuple(bounds),
        gathered_order=None if split is None else split.gathered_order,
    )


class PackedSelfAttention(SelfAttention):
    """Self-attention of packed sequences whose rows are all turned at once, by the angles of the rank's own rows.

    megatron-core cuts packed rows into sequences for that, in every layer, for queries and for keys, and reads the
    bounds from the device each time: some 57,000 waits in one forward of a tower with many windows.
    """

    _angles: torch.Tensor | None = None  # [T, 1, 1, dim], within a forward

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any
    ) -> Any:
        self._angles = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        query_T1LD, key_T1GD, value_T1GD = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is not None:
            scale = _yarn_get_concentration_factor_from_config(self.config)
            query_T1LD, key_T1GD = (
                apply_rotary_pos_emb(x, self._angles, self.config, mscale=scale, cp_group=self.pg_collection.cp)
                for x in (query_T1LD, key_T1GD)
            )
        return query_T1LD, key_T1GD, value_T1GD


class PackedAttention(MegatronModule):
    """Scaled dot-product attention over packed sequences (THD), causal or bidirectional, with grouped queries.

    One fused call for each run of equally long sequences (the windows of a picture are at most four runs): no [T, T]
    mask is formed, nothing is padded. Under context parallelism keys and values are gathered over the group, and each
    of a rank's two chunks of a sequence attends to the keys up to its own end.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.context_group = pg_collection.cp if pg_collection is not None else None
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> torch.Tensor:
        """query [T, heads, dim]; key, value [T, groups, dim] -> [T, heads, dim]; T is this rank's share of tokens."""
        assert packed_seq_params is not None, "sequences are always packed"
        causal = (attn_mask_type or self.attn_mask_type) in (AttnMaskType.causal, AttnMaskType.padding_causal)
        if self.context_group is not None and self.context_group.size() > 1:
            assert causal, "only causal attention is context parallel"
            return self._attend_in_context(query, key, value, packed_seq_params)
        lengths = [end - start for start, end in itertools.pairwise(packed_seq_params.bounds)]
        runs = [(length, len(list(equal))) for length, equal in itertools.groupby(lengths)]

        def attend(length: int, count: int, *run_XLD: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in run_XLD)
            gqa = q.shape[1] != k.shape[1]
            output = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale, enable_gqa=gqa)
            return output.transpose(1, 2).flatten(0, 1)

        # split, not slices: its backward is one concatenation instead of a zero-filled tensor per run
        rows = [length * count for length, count in runs]
        parts = zip(runs, *(x.split(rows) for x in (query, key, value)), strict=True)
        outputs = [attend(*run, *part) for run, *part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_in_context(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: PackedRow
    ) -> torch.Tensor:
        group = self.context_group
        assert group is not None and where.gathered_order is not None
        size, rank = group.size(), group.rank()
        gathered = gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1).contiguous(), tensor_parallel_output_grad=True, group=group
        )
        key, value = gathered.index_select(0, where.gathered_order).split(key.shape[-1], dim=-1)
        gqa = query.shape[1] != key.shape[1]
        outputs, begin = [], 0
        for start, end in itertools.pairwise(where.bounds):
            chunk = (end - start) // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                seen = (number + 1) * chunk
                q = query[begin : begin + chunk].transpose(0, 1)[None]
                k, v = (x[start : start + seen].transpose(0, 1)[None] for x in (key, value))
                # The chunk's last token sees all `seen` keys. As a bias of torch's own, not as a tensor: a GPU then has
                # fused kernels for it.
                mask: Any = causal_lower_right(chunk, seen)
                output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=gqa)
                outputs.append(output[0].transpose(0, 1))
                begin += chunk
        return torch.cat(outputs)


def final_norm(transformer_impl: str) -> Any:
    """The norm after the last layer."""
    if transformer_impl == "transformer_engine":
        return _te_final_norm()
    return TorchNorm


def layer_spec(
    attn_mask_type: AttnMaskType,
    *,
    self_attention: type[SelfAttention] = PackedSelfAttention,
    transformer_impl: str = "local",
) -> ModuleSpec:
    """One transformer layer: pre-norm attention and a gated MLP.

    Raises:
        ValueError: Transformer Engine is asked for and cannot be imported.
    """
    if transformer_impl == "transformer_engine":
        return _te_layer_spec(attn_mask_type, self_attention=self_attention)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm,
            self_attention=ModuleSpec(
                module=self_attention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TorchNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            # The names under which Transformer Engine's fused layers store the norms.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _extensions() -> Any:
    """Without Transformer Engine megatron-core replaces its wrappers by mocks that fail late; this fails at once."""
    from megatron.core.extensions import transformer_engine as extensions

    if not extensions.HAVE_TE:
        raise ValueError(
            "transformer_impl 'transformer_engine', but Transformer Engine cannot be imported: install the 'gpu' extra "
            "on a machine with CUDA, or use transformer_impl 'local'"
        )
    return extensions


def _te_layer_spec(attn_mask_type: AttnMaskType, *, self_attention: type[SelfAttention] = SelfAttention) -> ModuleSpec:
    """One transformer layer of Transformer Engine: fused norm and linear layers, fused attention, FP8. CUDA only.

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


def _te_final_norm() -> Any:
    return _extensions().TENorm
