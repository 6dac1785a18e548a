"""Tiny Qwen2.5-VL: grouped-query attention, QKV bias, M-RoPE, window attention with full-attention blocks, a patch
merger, untied (or tied) embeddings and a padded vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_r1reward.demo.tiny_tokenizer import SPECIAL_TOKENS

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
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

    def build(self, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
        return Qwen2_5_VLForConditionalGeneration(_config(self, tokenizer))

    def processors(self) -> dict[str, dict[str, Any]]:
        """Contents of the processor files, by file name."""
        image_processor = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
        }
        return {"preprocessor_config.json": image_processor}


def _config(spec: TinySpec, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
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
