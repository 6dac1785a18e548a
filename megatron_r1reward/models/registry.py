"""Model families by the `model_type` of a Hugging Face `config.json`: everything outside `models/` goes through here.

A family is five functions. Adding one means a package beside `qwen2_5_vl` and an entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig, PretrainedConfig

from megatron_r1reward.config.schema import MoeSection, ParallelSection, PrecisionSection
from megatron_r1reward.model_folder import folder_weights
from megatron_r1reward.model_folder.beside_weights import read_object
from megatron_r1reward.model_folder.shape import ModelShape, load_shape, read_shape
from megatron_r1reward.model_folder.weight_table import WeightTable
from megatron_r1reward.models import qwen2_5_vl, qwen3_vl
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


@dataclass(frozen=True, kw_only=True)
class Family:
    build_configs: BuildConfigs
    build_model: BuildModel
    positions: Positions

    def weight_table(self, hf: Any) -> WeightTable:
        """Every weight exactly once, under the names that published checkpoints use on disk."""
        return weight_table(hf)


def _qwen2_5_vl_configs(
    hf: Any, parallel: ParallelSection, dtype: torch.dtype, precision: PrecisionSection, moe: MoeSection
) -> Configs:
    return qwen2_5_vl.build_configs(hf, parallel, dtype, precision)


_QWEN3_VL = Family(
    build_configs=qwen3_vl.build_configs,
    build_model=qwen3_vl.Qwen3VL,
    positions=qwen3_vl.positions,
)
FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        build_configs=_qwen2_5_vl_configs,
        build_model=qwen2_5_vl.Qwen25VL,
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


def shape_of(hf: PretrainedConfig) -> ModelShape:
    """The sizes in a loaded Hugging Face configuration."""
    return read_shape(hf.to_dict(), str(hf.name_or_path or "the configuration"))


def weight_table(hf: PretrainedConfig) -> WeightTable:
    """Every weight exactly once, under the names that published checkpoints use on disk."""
    return folder_weights.weight_table(shape_of(hf))


def load_hf_config(folder: Path) -> Any:
    """The configuration of a checkpoint folder, as transformers' class for its `model_type`.

    Raises:
        ValueError: the folder holds no config.json, or one that is not supported (`model_folder.shape`), or that
            transformers refuses.
    """
    load_shape(folder)
    try:
        # `from_pretrained` comes to the same, and half of its time goes into a log line that shows all of it.
        return AutoConfig.for_model(**read_object(folder / "config.json"), name_or_path=folder)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'config.json'}: transformers cannot read it: {reason}") from error
