"""CPU-sized members of the model families, written as ordinary Hugging Face checkpoint folders.

They have everything that makes the big ones hard. transformers, vLLM and this package read the same folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_r1reward.demo.tiny_initialize import initialize
from megatron_r1reward.demo.tiny_qwen2_5_vl import TinySpec
from megatron_r1reward.demo.tiny_qwen3_vl import TinyQwen3Spec
from megatron_r1reward.demo.tiny_tokenizer import train_tokenizer

__all__ = ["TINY_SPECS", "TinyQwen3Spec", "TinySpec", "train_tokenizer", "write_tiny_checkpoint"]

TINY_SPECS: dict[str, TinySpec | TinyQwen3Spec] = {
    "qwen2_5_vl": TinySpec(),
    "qwen3_vl": TinyQwen3Spec(),
    "qwen3_vl_moe": TinyQwen3Spec(num_experts=8),
}


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
    initialize(model, seed, init_std)
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


def _experts_as_published(file: Path) -> None:
    """Published folders store stacked experts as [E, in, out], which is what vLLM reads. transformers reads that too,
    but writes its modules' [E, out, in]."""
    tensors = load_file(file)
    experts = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." in name}
    if experts:
        transposed = {name: tensor.transpose(1, 2).contiguous() for name, tensor in experts.items()}
        save_file(tensors | transposed, file, metadata={"format": "pt"})
