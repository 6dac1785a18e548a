"""Decoder layers of Qwen3-VL: q/k norms, mixture of experts, deepstack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_r1reward.parallel.specs import PackedRow, final_norm, layer_spec


@dataclass(frozen=True, kw_only=True)
class RouterBalance:
    """What the auxiliary losses of routers need to know about a micro-batch."""

    real_rows: torch.Tensor  # bool [T]: which of this rank's hidden states are no padding
    real_tokens: int  # of the whole micro-batch
    loss_tokens: int  # response tokens of the whole micro-batch: its weight


@dataclass
class DecoderRow(PackedRow):
    """Packed-sequence parameters, and where the deepstack features of `context` go: level i of it belongs to decoder
    layer `first_level + i` and is added to rows `visual_rows` of that layer's output."""

    visual_rows: torch.Tensor | None = None  # int64 [V], rows of this rank's hidden states that are image tokens
    first_level: int = 0
    balance: RouterBalance | None = None  # with experts


class DeepstackLayer(TransformerLayer):
    """Adds the deepstack features of its level to its output.

    The features travel as megatron-core's `context`, float [K, V, H]: an argument of every layer, so that gradients
    reach the vision tower under activation recomputation too.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        where: DecoderRow = kwargs["packed_seq_params"]
        if self.is_moe_layer:  # set here, so that a recomputed forward has its own micro-batch's
            self.mlp.router.balance = where.balance
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
    lengths. Here a micro-batch's auxiliary loss counts once per response token of the micro-batch, and padding is left
    out of it.

    The gate is plain torch: megatron-core's own asks for a matrix product of Transformer Engine even where that is not
    installed (a NameError in 0.16.1).
    """

    balance: RouterBalance

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """[T, 1, H] -> float32 [T, 1, E]."""
        return F.linear(input.float(), self.weight.float())

    def _apply_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        real_T1 = self.balance.real_rows[:, None]
        # with_padding_mask: tokens are counted by what they are routed to, so padding does not count.
        return super()._apply_aux_loss(
            probs, scores_for_aux_loss * real_T1, routing_map & real_T1, with_padding_mask=True
        )

    def attach_and_log_load_balancing_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight = {"valid_token_count": self.balance.loss_tokens}
        return super().attach_and_log_load_balancing_loss(*args, **(kwargs | weight))

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over real tokens of the squared log-sum-exp; each rank adds its own tokens' part."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares_T = logits.logsumexp(dim=-1).square() * self.balance.real_rows
        weight = coefficient * self.balance.loss_tokens / max(self.balance.real_tokens, 1)
        return MoEAuxLossAutoScaler.apply(logits, squares_T.sum() * weight)


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
