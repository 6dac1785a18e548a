"""Token ids that a response must never contain."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from megatron_r1reward.model_folder.config_reader import CONFIG, parse_config

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def banned_token_ids(model_path: Path) -> frozenset[int]:
    """Vision specials and the rows of the LM head that no token owns (padded vocabulary).

    A sampled image placeholder would make the trainer look for an image that is not there; a padding row has no text.

    Args:
        model_path: HF folder with config.json and tokenizer.json.

    Raises:
        ValueError: the tokenizer has more tokens than the model has logits.
    """
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    config = parse_config(model_path / CONFIG)
    vocab_size: int = config.get("text_config", config)["vocab_size"]
    owned = set(tokenizer.get_vocab(with_added_tokens=True).values())
    if max(owned) >= vocab_size:
        raise ValueError(
            f"{model_path}: the tokenizer has token id {max(owned)}, but config.json says vocab_size {vocab_size}: "
            "the two files are from different models"
        )
    vision = {token_id for token in VISION_TOKENS if (token_id := tokenizer.token_to_id(token)) is not None}
    return frozenset(vision | (set(range(vocab_size)) - owned))
