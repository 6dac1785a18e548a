"""What the folder of a model with a scalar head says about itself: the configuration that transformers' sequence
classifiers and vLLM's pooling models read, and how deep the head is (`score_layers`, a key of this package)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1reward.model_folder.config_reader import CONFIG, parse_config
from megatron_r1reward.model_folder.shape import SCALAR, is_scalar

LABELS = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}


def scalar_architecture(name: str) -> str:
    """E.g. "Qwen2_5_VLForConditionalGeneration" -> "Qwen2_5_VLForSequenceClassification"."""
    return name.partition("For")[0] + SCALAR


def is_scalar_folder(folder: Path) -> bool:
    """Whether a folder is that of a model with a scalar head; False where there is none.

    Raises:
        ValueError: its configuration cannot be read.
    """
    return (folder / CONFIG).is_file() and is_scalar(parse_config(folder / CONFIG))


def scalar_problem(folder: Path) -> str:
    """Why a folder cannot be asked for texts: it is a scalar reward model. Empty where it is none.

    Raises:
        ValueError: its configuration cannot be read.
    """
    if not is_scalar_folder(folder):
        return ""
    return "it is a scalar reward model, which writes no text: give a language model, or train it on with `r1reward rm`"


def scalar_config(text: str, layers: int) -> str:
    """The text of a config.json that names a scalar head of `layers` layers; unchanged where it does already."""
    tree: dict[str, Any] = json.loads(text)
    said = {"architectures": [scalar_architecture(name) for name in tree["architectures"]], "score_layers": layers}
    said |= LABELS
    return text if tree | said == tree else json.dumps(tree | said, indent=2, ensure_ascii=False) + "\n"
