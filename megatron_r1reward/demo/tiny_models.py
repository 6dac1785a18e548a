"""CPU-sized members of the model families, written as ordinary Hugging Face checkpoint folders.

They have everything that makes the big ones hard. transformers, vLLM and this package read the same folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_r1reward.demo.tiny_qwen2_5_vl import TinySpec
from megatron_r1reward.demo.tiny_qwen3_vl import TinyQwen3Spec
from megatron_r1reward.demo.tiny_tokenizer import train_tokenizer

__all__ = ["TINY_SPECS", "TinyQwen3Spec", "TinySpec", "train_tokenizer", "write_tiny_checkpoint"]

TINY_SPECS: dict[str, TinySpec | TinyQwen3Spec] = {
    "qwen2_5_vl": TinySpec(),
    "qwen3_vl": TinyQwen3Spec(),
    "qwen3_vl_moe": TinyQwen3Spec(num_experts=8),
}

# Random weights: for training, or peaked for tests.
EMBEDDING_STD = 0.05
QUERY_KEY_CORRELATION = 0.5
# The last linear of each residual branch, of either family.
BRANCH_ENDS = (
    "o_proj.weight", "mlp.down_proj.weight", "experts.down_proj", "attn.proj.weight", "mlp.linear_fc2.weight",
)  # fmt: skip


def write_tiny_checkpoint(
    out: Path,
    *,
    corpus: Iterable[str],
    phrases: Sequence[str] = (),
    seed: int = 0,
    spec: TinySpec | TinyQwen3Spec | None = None,
    tie_word_embeddings: bool | None = None,
    init_std: float = 0.0,
) -> None:
    """Write config, weights (float32), tokenizer, chat template and image processor to `out`.

    Args:
        out: folder to create.
        corpus: texts the tokenizer is trained on.
        phrases: texts that become one token each.
        spec: family and sizes, e.g. of `TINY_SPECS`; None: Qwen2.5-VL.
        init_std: 0 initializes for training (1/sqrt(fan-in)); a positive value, e.g. 0.15, gives a random model whose
            distributions are far from uniform, for tests.
    """
    spec = spec or TinySpec()
    if tie_word_embeddings is not None:
        spec = dataclasses.replace(spec, tie_word_embeddings=tie_word_embeddings)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus, spec.vocab_size, phrases)
    model = spec.build(tokenizer)
    _initialize(model, seed, init_std)
    if spec.tie_word_embeddings:
        model.tie_weights()
    model.config.dtype = torch.float32
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    _experts_as_published(out / "model.safetensors")
    tokenizer.save_pretrained(out)
    for name, content in spec.processors().items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def _initialize(model: Any, seed: int, std: float) -> None:
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


def _experts_as_published(file: Path) -> None:
    """Published folders store stacked experts as [E, in, out], which is what vLLM reads. transformers reads that too,
    but writes its modules' [E, out, in]."""
    tensors = load_file(file)
    experts = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." in name}
    if experts:
        transposed = {name: tensor.transpose(1, 2).contiguous() for name, tensor in experts.items()}
        save_file(tensors | transposed, file, metadata={"format": "pt"})
