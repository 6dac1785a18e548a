"""Decoder layers of Qwen3-VL: q/k norms, mixture of experts, deepstack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_r1reward.parallel.specs import final_norm, layer_spec


@dataclass
class DecoderSeqParams(PackedSeqParams):
    """Packed-sequence parameters, and where the deepstack features of `context` go: level i of it belongs to decoder
    layer `first_level + i` and is added to rows `visual_rows` of that layer's output."""

    visual_rows: torch.Tensor | None = None  # int64 [V], rows of this rank's hidden states that are image tokens
    first_level: int = 0
    loss_tokens: int = 0  # response tokens of the whole micro-batch: its weight in the auxiliary losses of routers


class DeepstackLayer(TransformerLayer):
    """Adds the deepstack features of its level to its output.

    The features travel as megatron-core's `context`, float [K, V, H]: an argument of every layer, so that gradients
    reach the vision tower under activation recomputation too.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        where: DecoderSeqParams = kwargs["packed_seq_params"]
        if self.is_moe_layer:  # set here, so that a recomputed forward has its own micro-batch's number
            self.mlp.router.loss_tokens = where.loss_tokens
        hidden_T1H, features_KVH = super().forward(*args, **kwargs)
        if features_KVH is not None:
            level = self.layer_number - 1 - where.first_level
            if level < features_KVH.shape[0]:
                hidden_T1H = hidden_T1H.index_add(0, where.visual_rows, features_KVH[level][:, None])
        return hidden_T1H, features_KVH


class WeightedRouter(TopKRouter):
    """Routing in float32, and auxiliary losses that weigh like the main loss.

    The main loss is a sum over response tokens, divided once by their global number. megatron-core scales an auxiliary
    loss by this rank's share of all tokens instead, which makes its weight depend on the layout and on the prompt
    lengths. Here a micro-batch's auxiliary loss counts once per response token of the micro-batch.

    The gate is plain torch: megatron-core's own asks for a matrix product of Transformer Engine even where that is not
    installed (a NameError in 0.16.1).
    """

    loss_tokens = 0

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """[T, 1, H] -> float32 [T, 1, E]."""
        return F.linear(input.float(), self.weight.float())

    def attach_and_log_load_balancing_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().attach_and_log_load_balancing_loss(*args, **(kwargs | {"valid_token_count": self.loss_tokens}))

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.config.moe_z_loss_coeff is None or not self.training or not torch.is_grad_enabled():
            return logits
        share = self.config.moe_z_loss_coeff / self.tp_cp_group.size()  # ranks hold equally many tokens
        return MoEAuxLossAutoScaler.apply(logits, z_loss_func(logits, share) * self.loss_tokens)


def decoder_layer_spec(*, num_experts: int, transformer_impl: str) -> ModuleSpec:
    """One decoder layer; with experts the gated MLP is replaced by routed ones."""
    spec = layer_spec(AttnMaskType.causal, transformer_impl=transformer_impl)
    norm = final_norm(transformer_impl)
    spec.module = DeepstackLayer
    attention = spec.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = norm
    if not num_experts:
        return spec
    # The norm before a router is no part of a linear layer: it is a module, and stored, under its own name.
    spec.submodules.pre_mlp_layernorm = norm
    spec.submodules.sharded_state_dict_keys_map = {
        ours: fused
        for ours, fused in spec.submodules.sharded_state_dict_keys_map.items()
        if ours != "pre_mlp_layernorm."
    }
    if transformer_impl == "transformer_engine":
        spec.submodules.mlp = get_moe_module_spec(use_te=True, num_experts=num_experts, moe_grouped_gemm=True)
        spec.submodules.mlp.submodules.router = WeightedRouter
    else:
        spec.submodules.mlp = ModuleSpec(
            module=MoELayer,
            submodules=MoESubmodules(
                experts=ModuleSpec(module=SequentialMLP, submodules=spec.submodules.mlp.submodules),
                router=WeightedRouter,
            ),
        )
    return spec
