"""The model families: which module holds the weight table for a `model_type` of `config.json`."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from transformers import AutoConfig

from megatron_r1reward.models.mapping import WeightTable

WEIGHT_TABLES = {
    "qwen2_5_vl": "megatron_r1reward.models.qwen2_5_vl.mapping",
    "qwen3_vl": "megatron_r1reward.models.qwen3_vl.mapping",
    "qwen3_vl_moe": "megatron_r1reward.models.qwen3_vl.mapping",
}


def load_weight_table(folder: Path) -> WeightTable:
    """The weight table for the model that `folder/config.json` describes; no weights are needed.

    Raises:
        ValueError: there is no config.json, or its family is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: give a Hugging Face checkpoint folder")
    model_type = json.loads(path.read_text()).get("model_type")
    if model_type not in WEIGHT_TABLES:
        raise ValueError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(WEIGHT_TABLES)}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    table: WeightTable = import_module(WEIGHT_TABLES[model_type]).weight_table(config)
    return table
