"""Model families by the `model_type` of a Hugging Face `config.json`: everything outside `models/` goes through here.

A family is five functions. Adding one means a package beside `qwen2_5_vl` and an entry in `FAMILIES`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig, PretrainedConfig

from megatron_r1reward.config.schema import MoeSection, ParallelSection, PrecisionSection
from megatron_r1reward.models import qwen2_5_vl, qwen3_vl
from megatron_r1reward.models.mapping import WeightTable
from megatron_r1reward.parallel.setup import Topology


class Configs(Protocol):
    """megatron-core configurations of one model; a family adds those of its vision tower."""

    @property
    def hf(self) -> Any: ...
    @property
    def language(self) -> TransformerConfig: ...


class BuildConfigs(Protocol):
    def __call__(
        self, hf: Any, parallel: ParallelSection, dtype: torch.dtype, precision: PrecisionSection, moe: MoeSection, /
    ) -> Configs:
        """`moe` says nothing to a dense model. Raises ValueError when the layout does not divide the model."""


class BuildModel(Protocol):
    def __call__(self, configs: Any, topology: Topology, chunk: int = 0, /) -> MegatronModule:
        """Model chunk `chunk` of one stage. Its forward takes a PackedBatch and an optional LossRequest; the last
        chunk returns float32 [2, R], log-probs and entropies of the response tokens, or the loss that was asked for.
        `vision` is the tower, None on chunks without one."""


class Positions(Protocol):
    def __call__(
        self,
        token_ids: Sequence[int],
        image_grids: Sequence[tuple[int, int, int]],
        *,
        image_token_id: int,
        merge_size: int,
    ) -> torch.Tensor:
        """M-RoPE positions of one sequence, before packing: int64 [3, T]."""


class BuildTable(Protocol):
    def __call__(self, hf: Any, /) -> WeightTable:
        """Every weight exactly once, under the names that published checkpoints use on disk."""


@dataclass(frozen=True, kw_only=True)
class Family:
    build_configs: BuildConfigs
    build_model: BuildModel
    weight_table: BuildTable
    positions: Positions


def _qwen2_5_vl_configs(
    hf: Any, parallel: ParallelSection, dtype: torch.dtype, precision: PrecisionSection, moe: MoeSection
) -> Configs:
    return qwen2_5_vl.build_configs(hf, parallel, dtype, precision)


_QWEN3_VL = Family(
    build_configs=qwen3_vl.build_configs,
    build_model=qwen3_vl.Qwen3VL,
    weight_table=qwen3_vl.weight_table,
    positions=qwen3_vl.positions,
)
FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        build_configs=_qwen2_5_vl_configs,
        build_model=qwen2_5_vl.Qwen25VL,
        weight_table=qwen2_5_vl.weight_table,
        positions=qwen2_5_vl.mrope_positions,
    ),
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
}


def family_of(hf: PretrainedConfig) -> Family:
    """The family of a loaded Hugging Face configuration; ValueError when there is none."""
    if hf.model_type not in FAMILIES:
        raise ValueError(f"{hf.model_type!r} is no supported model family; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[hf.model_type]


def load_hf_config(folder: Path) -> Any:
    """The configuration of a checkpoint folder, as transformers' class for its `model_type`.

    Raises:
        ValueError: the folder holds no config.json, or one of a family that is not supported.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path {folder} holds no config.json: give a Hugging Face checkpoint folder")
    model_type = json.loads(file.read_text()).get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model.path {folder} is a {model_type!r} model; supported: {', '.join(sorted(FAMILIES))}")
    return AutoConfig.from_pretrained(folder, local_files_only=True)
