"""A CPU-sized member of the Qwen2.5-VL family, written as an ordinary Hugging Face checkpoint folder.

It has everything that makes the big ones hard: grouped-query attention, QKV bias, M-RoPE, window attention with
full-attention blocks, a patch merger, untied (or tied) embeddings and a padded vocabulary. transformers, vLLM and
this package read the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# The family's special tokens in the family's order; the names are what chat templates and processors refer to.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

# Qwen2's pre-tokenizer, except that a digit takes its leading space along as words do: digits one by one, words,
# punctuation runs, line breaks.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
EMBEDDING_STD = 0.05
QUERY_KEY_CORRELATION = 0.5
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class TinySpec:
    """Sizes of the tiny member. The default has about 0.9 million parameters."""

    vocab_size: int = 768  # upper bound of the trained vocabulary, before special tokens and padding
    hidden_size: int = 128
    intermediate_size: int = 320
    num_layers: int = 2  # matching an answer to a response takes two; more learn it later in a short training
    num_heads: int = 4
    num_key_value_heads: int = 2
    mrope_section: tuple[int, int, int] = (4, 6, 6)  # half of the head dimension
    rope_theta: float = 10_000.0  # prompts are short: a small base leaves more frequencies that tell neighbours apart
    max_position_embeddings: int = 4096
    vision_depth: int = 2
    vision_hidden_size: int = 96
    vision_intermediate_size: int = 192
    vision_num_heads: int = 4
    vision_full_attention_blocks: tuple[int, ...] = (1,)
    vision_window_size: int = 56  # pixels; digits images are 56 to 168 wide, so both kinds of block matter
    tie_word_embeddings: bool = False
    pad_vocab_to: int = 64
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 64


def train_tokenizer(corpus: Iterable[str], vocab_size: int, phrases: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in Qwen2's manner, trained on `corpus`; any text stays representable.

    Each of `phrases`, e.g. the fixed parts of a prompt template, becomes one token of its own: a model with a small
    vocabulary then reads a long template in a few tokens.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in phrases])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(spec: TinySpec, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    padded_vocab = -(-len(tokenizer) // spec.pad_vocab_to) * spec.pad_vocab_to
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=padded_vocab,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_key_value_heads,
            max_position_embeddings=spec.max_position_embeddings,
            rms_norm_eps=1e-6,
            rope_parameters={
                "rope_type": "default",
                "mrope_section": list(spec.mrope_section),
                "rope_theta": spec.rope_theta,
            },
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            tie_word_embeddings=spec.tie_word_embeddings,
        ),
        vision_config=dict(
            depth=spec.vision_depth,
            hidden_size=spec.vision_hidden_size,
            intermediate_size=spec.vision_intermediate_size,
            num_heads=spec.vision_num_heads,
            out_hidden_size=spec.hidden_size,
            fullatt_block_indexes=list(spec.vision_full_attention_blocks),
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=spec.vision_window_size,
            in_channels=3,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=spec.tie_word_embeddings,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
    )


@torch.no_grad()
def _initialize(model: Qwen2_5_VLForConditionalGeneration, seed: int, std: float) -> None:
    """std = 0: Gaussian weights of 1/sqrt(fan-in), the last linear of each residual branch scaled down by the number of
    branches. A positive std sets every weight's deviation: the distributions get peaked, which makes parity tests
    sensitive."""
    generator = torch.Generator().manual_seed(seed)
    branches = 2 * model.config.text_config.num_hidden_layers
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            is_norm = "norm" in name or "ln_q" in name
            parameter.copy_(noise * (0.1 if is_norm else 0.05) * (std > 0) + (1.0 if is_norm else 0.0))
        elif std > 0:
            parameter.copy_(noise * std)
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.copy_(noise * EMBEDDING_STD)
        else:
            ends_branch = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight"))
            parameter.copy_(noise * parameter[0].numel() ** -0.5 * (branches**-0.5 if ends_branch else 1.0))
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


def write_tiny_checkpoint(
    out: Path,
    *,
    corpus: Iterable[str],
    phrases: Sequence[str] = (),
    seed: int = 0,
    spec: TinySpec | None = None,
    tie_word_embeddings: bool | None = None,
    init_std: float = 0.0,
) -> None:
    """Write config, weights (float32), tokenizer, chat template and image processor to `out`.

    Args:
        out: folder to create.
        corpus: texts the tokenizer is trained on.
        phrases: texts that become one token each.
        init_std: 0 initializes for training (1/sqrt(fan-in)); a positive value, e.g. 0.15, gives a random model whose
            distributions are far from uniform, for tests.
    """
    spec = spec or TinySpec()
    if tie_word_embeddings is not None:
        spec = TinySpec(**{**spec.__dict__, "tie_word_embeddings": tie_word_embeddings})
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus, spec.vocab_size, phrases)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(spec, tokenizer))
    _initialize(model, seed, init_std)
    if spec.tie_word_embeddings:
        model.tie_weights()
    model.config.dtype = torch.float32
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": spec.min_pixels,
        "max_pixels": spec.max_pixels,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
