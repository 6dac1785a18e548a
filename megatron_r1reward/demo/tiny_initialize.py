"""Random weights of tiny models: for training, or peaked for tests."""

from __future__ import annotations

from typing import Any

import torch

EMBEDDING_STD = 0.05
QUERY_KEY_CORRELATION = 0.5
# The last linear of each residual branch, of either family.
BRANCH_ENDS = (
    "o_proj.weight", "mlp.down_proj.weight", "experts.down_proj", "attn.proj.weight", "mlp.linear_fc2.weight",
)  # fmt: skip


@torch.no_grad()
def initialize(model: Any, seed: int, std: float) -> None:
    """std = 0: Gaussian weights of 1/sqrt(fan-in), the last linear of each residual branch scaled down by the number of
    branches. A positive std sets every weight's deviation: the distributions get peaked, which makes parity tests
    sensitive."""
    generator = torch.Generator().manual_seed(seed)
    branches = 2 * model.config.text_config.num_hidden_layers
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            is_norm = ("norm" in name or "ln_q" in name) and name.endswith("weight")
            parameter.copy_(noise * (0.1 if is_norm else 0.05) * (std > 0) + (1.0 if is_norm else 0.0))
        elif std > 0:
            parameter.copy_(noise * std)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight", "pos_embed.weight")):
            parameter.copy_(noise * EMBEDDING_STD)
        else:
            # Stacked experts are [E, out, in]; everything else is [out, ...].
            fan_in = parameter.shape[-1] if "experts." in name else parameter[0].numel()
            parameter.copy_(noise * fan_in**-0.5 * (branches**-0.5 if name.endswith(BRANCH_ENDS) else 1.0))
    if std == 0:
        for layer in model.model.language_model.layers:
            _align_queries_with_keys(layer.self_attn)


def _align_queries_with_keys(attention: Any) -> None:
    """Let each query head start correlated with its key head, so that tokens look for tokens like themselves from the
    first step (mimetic initialization, Trockman & Kolter 2023). Finding the response that says what the image shows is
    such a search; without this start it is learned later."""
    query, key = attention.q_proj.weight, attention.k_proj.weight
    heads_per_key = query.shape[0] // key.shape[0]
    grouped = key.reshape(-1, attention.head_dim, key.shape[1]).repeat_interleave(heads_per_key, dim=0)
    noise_share = (1.0 - QUERY_KEY_CORRELATION**2) ** 0.5
    query.copy_(QUERY_KEY_CORRELATION * grouped.reshape(query.shape) + noise_share * query)
