"""Tiny Qwen3-VL, dense or mixture of experts: heads wider than hidden / heads, q/k norms, interleaved M-RoPE, deepstack
features from inner vision blocks, resampled position embeddings, patches of 16 pixels, a padded vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from megatron_r1reward.demo.tiny_tokenizer import SPECIAL_TOKENS


@dataclass(frozen=True, kw_only=True)
class TinyQwen3Spec:
    """Sizes of the tiny member. The default has 1.5 million parameters. `num_experts` > 0 makes every layer's MLP
    a mixture of experts, except those in `mlp_only_layers`."""

    vocab_size: int = 768  # upper bound of the trained vocabulary, before special tokens and padding
    hidden_size: int = 128
    intermediate_size: int = 320
    num_layers: int = 3  # one more than deepstack levels: the last layer's level would reach no response token
    num_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64  # not hidden_size / num_heads
    mrope_section: tuple[int, int, int] = (12, 10, 10)  # half of the head dimension
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 4096
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 96
    mlp_only_layers: tuple[int, ...] = ()
    vision_depth: int = 3
    vision_hidden_size: int = 96
    vision_intermediate_size: int = 192
    vision_num_heads: int = 4
    vision_table_side: int = 8  # position embeddings per axis; image grids are smaller and larger
    deepstack_blocks: tuple[int, ...] = (0, 1)
    tie_word_embeddings: bool = False
    pad_vocab_to: int = 64
    min_pixels: int = 64 * 64
    max_pixels: int = 32 * 32 * 64

    def build(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration:
        if self.num_experts:
            return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**_config(self, tokenizer)))
        return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**_config(self, tokenizer)))

    def processors(self) -> dict[str, dict[str, Any]]:
        """Contents of the processor files, by file name."""
        shared = {
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        return {
            "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **shared},
            "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", **shared},
        }


def _config(spec: TinyQwen3Spec, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    padded_vocab = -(-len(tokenizer) // spec.pad_vocab_to) * spec.pad_vocab_to
    text: dict[str, Any] = dict(
        vocab_size=padded_vocab,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=1e-6,
        rope_parameters={
            "rope_type": "default",
            "mrope_section": list(spec.mrope_section),
            "mrope_interleaved": True,
            "rope_theta": spec.rope_theta,
        },
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        tie_word_embeddings=spec.tie_word_embeddings,
    )
    if spec.num_experts:
        text |= dict(
            num_experts=spec.num_experts,
            num_experts_per_tok=spec.num_experts_per_tok,
            moe_intermediate_size=spec.moe_intermediate_size,
            norm_topk_prob=True,  # published folders say so, vLLM reads it, transformers always does it
            mlp_only_layers=list(spec.mlp_only_layers),
            decoder_sparse_step=1,
        )
    vision = dict(
        depth=spec.vision_depth,
        hidden_size=spec.vision_hidden_size,
        intermediate_size=spec.vision_intermediate_size,
        num_heads=spec.vision_num_heads,
        out_hidden_size=spec.hidden_size,
        num_position_embeddings=spec.vision_table_side**2,
        deepstack_visual_indexes=list(spec.deepstack_blocks),
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        in_channels=3,
    )
    return dict(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=spec.tie_word_embeddings,
    )
