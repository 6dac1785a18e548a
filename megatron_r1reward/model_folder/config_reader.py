"""Reads a `config.json` and keeps account: what was not read, or has a value that is not implemented, is named.

A model computes what its configuration says only where every key is either used, or known not to change the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1reward.model_folder.other_folder import instead_of_model

CONFIG = "config.json"
# Keys about other things than what the model computes: where it came from, labels of classifiers, what a forward pass
# returns, initialisation, generation. transformers writes most of them into every configuration.
OTHER_MATTERS = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
        "architectures", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward",
        "custom_pipelines", "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range",
        "is_decoder", "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type",
        "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "prefix",
        "problem_type", "return_dict", "router_aux_loss_coef", "sep_token_id", "task_specific_params",
        "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16",
        "use_cache", "use_return_dict",
    }
)  # fmt: skip
# What transformers up to 4.x wrote about generation into model configurations.
_GENERATION = frozenset(
    {
        "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
        "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
        "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
        "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
        "temperature", "tf_legacy_loss", "tie_encoder_decoder", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip
_PREFIXES = ("unsloth_",)  # notes of a program for fine-tuning about itself


def parse_config(path: Path) -> dict[str, Any]:
    """The object in a `config.json`.

    Raises:
        ValueError: the file is missing, or no JSON object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path.parent} {instead_of_model(path.parent)}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}; download it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, not a JSON object: download it again")
    return tree


class ConfigReader:
    """One object of a configuration. Whatever is wrong is collected in `problems`, so that all of it is said at once;
    a value that cannot be used is replaced by 1 (or the default) to go on reading.

    Args:
        tree: the object.
        section: how the user finds it, e.g. "text_config"; "" at the top.
        problems: shared by the readers of one file.
    """

    def __init__(self, tree: Any, section: str, problems: list[str]) -> None:
        self.section, self.problems = section, problems
        if not isinstance(tree, Mapping):
            problems.append(f"{section} is {json.dumps(tree)[:40]}, not an object")
            tree = {}
        self.tree: Mapping[str, Any] = tree
        self.read: set[str] = set()

    def name(self, key: str) -> str:
        return f"{self.section}.{key}" if self.section else key

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where it is absent or null."""
        self.read.add(key)
        value = self.tree.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        return self.tree.get(key) is not None

    def problem(self, key: str, text: str) -> None:
        value = json.dumps(self.tree.get(key), default=str)
        self.problems.append(f"{self.name(key)} = {value[:60]}: {text}")

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer. Without a default the key has to be there."""
        value = self.get(key, default)
        if value is None:
            self.problems.append(f"{self.name(key)} is missing")
            return 1
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.problem(key, "a positive integer is needed")
            return 1
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            self.problem(key, "a positive number is needed")
            return default
        return float(value)

    def token(self, key: str, default: int) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.problem(key, "a token id is needed")
            return default
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.problem(key, "true or false is needed")
            return default
        return value

    def indices(self, key: str, default: tuple[int, ...] | None, below: int) -> tuple[int, ...]:
        """Distinct numbers of layers or blocks, each below `below`."""
        value = self.get(key, default)
        if value is None:
            self.problems.append(f"{self.name(key)} is missing")
            return ()
        good = isinstance(value, list | tuple) and all(
            isinstance(index, int) and not isinstance(index, bool) and 0 <= index < below for index in value
        )
        if not good or len(set(value)) != len(value):
            self.problem(key, f"distinct numbers from 0 to {below - 1} are needed")
            return ()
        return tuple(value)

    def only(self, key: str, implemented: Any) -> None:
        """The key may be absent, or have the one value that is implemented."""
        value = self.get(key, implemented)
        if value != implemented or isinstance(value, bool) != isinstance(implemented, bool):
            self.problem(key, f"not implemented, only {json.dumps(implemented)} is")

    def ignore(self, *keys: str) -> None:
        """These say nothing about what is computed."""
        self.read.update(keys)

    def finish(self) -> None:
        """Name every key that nothing has read and that is not known to concern other matters; null sets nothing."""
        known = self.read | OTHER_MATTERS | _GENERATION
        for key, value in self.tree.items():
            if value is not None and key not in known and not key.startswith(_PREFIXES):
                self.problem(key, "unknown here, so it may change the model: remove it if it does not")
