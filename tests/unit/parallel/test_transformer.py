"""Combinations that megatron-core runs without an error and with wrong numbers are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1reward.config.schema import MoeSection, ParallelSection, PrecisionSection
from megatron_r1reward.models.registry import family_of, load_hf_config
from megatron_r1reward.parallel.transformer import check_language_config


@pytest.fixture
def config(tiny_folder) -> TransformerConfig:
    hf = load_hf_config(tiny_folder)
    parallel = ParallelSection(pipeline_model_parallel_size=2, vision_placement="own_stage")
    return family_of(hf).build_configs(hf, parallel, torch.float32, PrecisionSection(), MoeSection()).language


def test_built_configurations_pass(config) -> None:
    check_language_config(config)
    assert not config.batch_p2p_comm
    assert config.deallocate_pipeline_outputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"virtual_pipeline_model_parallel_size": 2, "batch_p2p_comm": True}, "pairs the wrong chunks"),
        ({"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": False}, "only with overlap_p2p_comm"),
        ({"fp8": "hybrid", "transformer_impl": "local"}, "ignored by local layers"),
        ({"cross_entropy_loss_fusion": True}, "rounds the gradient"),
        ({"perform_initialization": False}, "tensor-parallel attributes"),
        ({"calculate_per_token_loss": False}, "divided once"),
    ],
)
def test_silent_traps_are_refused(config, changes, message) -> None:
    changed = dataclasses.replace(config, pipeline_model_parallel_layout=None, num_layers=4)
    for name, value in changes.items():
        setattr(changed, name, value)
    with pytest.raises(ValueError, match=message):
        check_language_config(changed)
