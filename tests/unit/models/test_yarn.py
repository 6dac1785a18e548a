"""YaRN: log-probs with scaled rotary positions are transformers'. vLLM scales M-RoPE otherwise, and RL says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.conversion import parity
from megatron_r1reward.launch.stage_models import check_models
from megatron_r1reward.models.qwen2_5_vl.rotary import rotary_frequencies
from megatron_r1reward.models.registry import load_hf_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10_000.0}


@pytest.fixture(scope="module")
def scaled(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yarn") / "hf"
    shutil.copytree(tiny_folder, folder)
    tree = json.loads((folder / "config.json").read_text())
    tree["text_config"]["rope_parameters"] = YARN | {"mrope_section": [4, 6, 6]}
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def test_log_probs_with_yarn_are_those_of_transformers(scaled: Path, tiny_folder: Path, tmp_path: Path) -> None:
    packer, sequence = parity._sample(scaled, tmp_path / "sample.png")
    ours = parity._megatron(scaled, scaled, packer, sequence)
    torch.testing.assert_close(ours, parity._transformers(scaled, packer, sequence), atol=1e-4, rtol=0)
    unscaled = parity._megatron(tiny_folder, tiny_folder, packer, sequence)
    assert (ours - unscaled).abs().max() > 0.01, "the scaling has to matter for this test to mean anything"


def vllm_table(original: int) -> torch.Tensor:
    """cos and sin [positions, 32] as vLLM computes them for this original length."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    parameters = YARN | {"mrope_section": [4, 6, 6], "original_max_position_embeddings": original}
    with set_current_vllm_config(VllmConfig()):
        return get_rope(32, 4096, rope_parameters=parameters, dtype=torch.float32).cos_sin_cache


@pytest.mark.slow
def test_vllm_takes_the_original_length_four_times_so_rl_is_refused(scaled: Path) -> None:
    """When this test fails, vLLM agrees with transformers: take the refusal away."""
    unscaled_F = 1.0 / 10_000.0 ** (torch.arange(0, 32, 2).float() / 32)
    angles_TF = torch.arange(100).float()[:, None] * rotary_frequencies(load_hf_config(scaled).text_config, unscaled_F)
    ours_TF = torch.cat([angles_TF.cos(), angles_TF.sin()], dim=-1) * (0.1 * torch.tensor(YARN["factor"]).log() + 1)
    assert (vllm_table(32)[:100] - ours_TF).abs().max() > 0.1
    torch.testing.assert_close(vllm_table(8)[:100], ours_TF, atol=1e-5, rtol=0)
    tree = {"run": {"output_dir": "unused"}, "model": {"path": str(scaled)}, "data": {"train": "unused"}}
    check_models(RunConfig.model_validate(tree | {"sft": {}}), "sft")
    with pytest.raises(ValueError, match=r"rope.*yarn.*vLLM"):
        check_models(RunConfig.model_validate(tree | {"rl": {}, "reward": {"use_judge": False}}), "rl")
