"""YaRN: log-probs with scaled rotary positions are transformers', and vLLM is given what it needs to agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_r1reward.config.schema import RunConfig, ServerSection
from megatron_r1reward.conversion import parity
from megatron_r1reward.launch.stage_models import check_models
from megatron_r1reward.model_folder.shape import Family
from megatron_r1reward.models.qwen2_5_vl.rotary import rotary_frequencies
from megatron_r1reward.models.registry import load_hf_config
from megatron_r1reward.servers.command import model_corrections

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


def vllm_table(family: Family, original: int, **changed: float) -> torch.Tensor:
    """cos and sin [positions, 32] as vLLM computes them for a family."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    parameters = YARN | {"mrope_section": [4, 6, 6], "original_max_position_embeddings": original} | changed
    with set_current_vllm_config(VllmConfig()):
        factor = {} if family == "qwen2_5_vl" else {"mrope_positions_factor": 1}  # as its classes in vLLM call it
        return get_rope(32, 4096, rope_parameters=parameters, dtype=torch.float32, **factor).cos_sin_cache


@pytest.mark.slow
@pytest.mark.parametrize("original", [32, 1000, 32_768])
def test_servers_compute_yarn_as_the_trainer_does(scaled: Path, original: int, tmp_path: Path) -> None:
    """With the options that every server of the folder gets; vLLM by itself takes the original length four times."""
    config = load_hf_config(scaled).text_config
    config.rope_parameters["original_max_position_embeddings"] = original
    unscaled_F = 1.0 / 10_000.0 ** (torch.arange(0, 32, 2).float() / 32)
    angles_TF = torch.arange(4 * original).float()[:, None] * rotary_frequencies(config, unscaled_F)
    ours_TF = torch.cat([angles_TF.cos(), angles_TF.sin()], dim=-1) * (0.1 * torch.tensor(YARN["factor"]).log() + 1)

    folder = tmp_path / "hf"
    shutil.copytree(scaled, folder)
    tree = json.loads((folder / "config.json").read_text())
    tree["text_config"]["rope_parameters"]["original_max_position_embeddings"] = original
    (folder / "config.json").write_text(json.dumps(tree))
    options = model_corrections(folder, ServerSection(max_model_len=128))
    override = json.loads(options["--hf-overrides"])["text_config"]["rope_parameters"]
    corrected = vllm_table("qwen2_5_vl", original, **override)
    torch.testing.assert_close(corrected[: len(ours_TF)], ours_TF, atol=1e-3, rtol=0)
    assert torch.equal(corrected[: len(ours_TF)], vllm_table("qwen3_vl", original)[: len(ours_TF)]), "which needs none"
    assert (vllm_table("qwen2_5_vl", original)[: len(ours_TF)] - ours_TF).abs().max() > 0.1, "as long as this holds"


def test_rl_with_yarn_is_refused_only_beyond_its_reach(scaled: Path, tmp_path: Path) -> None:
    """Qwen3-VL: vLLM's engine dies of the first request that is longer. Qwen2.5-VL has four times that room."""
    (rows := tmp_path / "rows.jsonl").write_text("{}\n")
    tree = {"run": {"output_dir": "unused"}, "model": {"path": str(scaled)}, "data": {"train": str(rows)}}
    rl = RunConfig.model_validate(tree | {"rl": {}, "reward": {"use_judge": False}})
    check_models(rl.model_copy(update={"rollout": ServerSection(max_model_len=512)}), "rl")
    with pytest.raises(ValueError, match=r"max_model_len 513 is more than the 512 positions that"):
        check_models(rl.model_copy(update={"rollout": ServerSection(max_model_len=513)}), "rl")
