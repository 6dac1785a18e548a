"""`r1reward plan`: the run files of the repository fit, and what does not fit is refused with a change that does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.config.load import load_config
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.planner.plan import make_plan, stage_of
from megatron_r1reward.planner.suggest import as_overrides, nearest_fit

ROOT = Path(__file__).parents[3]
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.toml") if p.stem in ("sft", "rl") and "demo" not in p.parts)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_every_run_file_of_the_repository_fits(path: Path):
    config = load_config(path)
    plan = make_plan(config, stage_of(config))
    assert plan.stage == path.stem
    assert not plan.problems
    # what the estimates cannot see must have room too
    assert plan.peak.total < 0.9 * plan.device.memory_bytes
    assert plan.devices.trainer % (plan.layout.world // plan.layout.dp) == 0


def test_there_is_a_pair_for_every_size():
    folders = {p.parent.relative_to(ROOT / "recipes").as_posix() for p in RECIPES}
    assert folders >= {"qwen2_5_vl_3b", "qwen2_5_vl_7b/paper", "qwen2_5_vl_7b/released", "qwen2_5_vl_32b"}
    assert folders >= {"qwen2_5_vl_72b", "qwen3_vl_8b", "qwen3_vl_30b_a3b"}


def _run_file(folder: Path, model: str = "Qwen2.5-VL-7B-Instruct", sections: str = "[sft]\n") -> str:
    path = folder / "run.toml"
    path.write_text(f'[run]\noutput_dir = "x"\n[model]\npath = "models/{model}"\n[data]\ntrain = "x.jsonl"\n{sections}')
    return str(path)


def _plan(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_a_run_that_fits(tmp_path: Path):
    result = _plan(
        _run_file(tmp_path), "parallel.tensor_model_parallel_size=4", "parallel.recompute=full", "--json",
        str(tmp_path / "plan.json"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "fits:" in result.output
    assert "not measured" in result.output
    assert "no weights at models/Qwen2.5-VL-7B-Instruct" in result.output
    tree = json.loads((tmp_path / "plan.json").read_text())
    assert tree["fits"]
    assert tree["plan"]["total_parameters"] == 8_292_166_656


def test_a_run_that_does_not_fit_names_a_change_that_does(tmp_path: Path):
    run_file = _run_file(tmp_path)
    result = _plan(run_file, "--json", "-")
    assert result.exit_code == 1
    tree = json.loads(result.output)
    assert "language activations" in tree["problems"][0]
    overrides = as_overrides(tree["nearest_fit"]).split()
    assert _plan(run_file, *overrides).exit_code == 0


def test_an_illegal_layout_names_the_nearest_legal_one(tmp_path: Path):
    result = _plan(_run_file(tmp_path), "parallel.tensor_model_parallel_size=8")
    assert result.exit_code == 1
    assert "does not divide num_attention_heads 28" in result.output
    assert "tensor_model_parallel_size 4" in result.output
    assert "nearest change that fits" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ("[sft]\n[rl]\n", "--stage"),
        ("[rl]\n[rollout]\ncount = 8\n[judge]\nmodel_path = 'models/Qwen2.5-VL-7B-Instruct'\n", "plan.nodes"),
        ("[rl]\n[rollout]\ntensor_parallel_size = 16\n[reward]\nuse_judge = false\n", "does not span nodes"),
        ("[sft]\nglobal_batch_size = 4\n", "sft.global_batch_size"),
    ],
)
def test_refusals(sections: str, words: str, tmp_path: Path):
    result = _plan(_run_file(tmp_path, sections=sections))
    assert result.exit_code in (1, 2)
    assert words in result.output.replace("\n", " ")


def test_an_unknown_model_names_the_shipped_ones(tmp_path: Path):
    result = _plan(_run_file(tmp_path, model="Llama"))
    assert result.exit_code == 2
    assert "Qwen3-VL-30B-A3B-Instruct" in result.output


def test_colocated_servers_need_room_beside_the_trainers_state(make_config):
    keys = {
        "cluster.layout": "colocated", "rollout.count": 8, "reward.use_judge": False,
        "parallel.tensor_model_parallel_size": 4, "parallel.recompute": "full",
    }  # fmt: skip
    config = make_config("Qwen2.5-VL-7B-Instruct", stage="rl", **keys, **{"rollout.gpu_memory_utilization": 0.9})
    plan = make_plan(config, "rl")
    assert plan.devices.trainer == plan.devices.rollout == 8
    assert "rollout.gpu_memory_utilization" in plan.problems[0]
    found = nearest_fit(config, "rl")
    assert found is not None
    assert set(found[0]) == {"rollout.gpu_memory_utilization"}


def test_a_folder_with_only_a_configuration_is_enough(tmp_path: Path):
    from megatron_r1reward.planner.catalog import bundled_config

    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(bundled_config("Qwen2.5-VL-3B-Instruct")))
    result = _plan(_run_file(tmp_path), f"model.path={folder}", "parallel.recompute=full")
    assert "3,754,622,976" in result.output
    assert "no weights" in result.output


def test_a_stand_in_plans_a_model_that_an_earlier_stage_will_write(make_config):
    config = make_config("not-written-yet", **{"plan.model": "Qwen3-VL-8B-Instruct", "parallel.recompute": "full"})
    assert sum(make_plan(config, "sft").parameters.values()) == 8_767_123_696


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "stage", "keys", "needed"),
    [
        ("Qwen3-VL-8B-Instruct", "sft", {"parallel.expert_model_parallel_size": 2}, "expert_model_parallel_size=1"),
        ("Qwen3-VL-30B-A3B-Instruct", "sft", {"parallel.tensor_model_parallel_size": 2}, "sequence_parallel=true"),
        ("Qwen2.5-VL-7B-Instruct", "rl", {"cluster.trainer_nodes": 3, "rollout.count": 3}, "plan.nodes="),
        ("Qwen2.5-VL-7B-Instruct", "sft", {"sft.global_batch_size": 4}, "sft.global_batch_size=8"),
        ("Qwen2.5-VL-7B-Instruct", "sft", {"parallel.tensor_model_parallel_size": 8}, "tensor_model_parallel_size=4"),
    ],
)
def test_what_is_suggested_fits(make_config, model: str, stage: str, keys: dict[str, Any], needed: str) -> None:
    config = make_config(model, stage, **keys)
    with pytest.raises(ValueError):
        make_plan(config, stage)
    found = nearest_fit(config, stage)
    assert found is not None
    assert needed in as_overrides(found[0])
    tree = config.model_dump(exclude_unset=True)
    for key, value in found[0].items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    assert make_plan(RunConfig.model_validate(tree), stage).fits


def test_the_longest_sequence_of_sft_is_no_matter_of_sampling(make_config) -> None:
    plans = [
        make_plan(make_config("Qwen2.5-VL-7B-Instruct", "sft", **{"sampling.max_tokens": n}), "sft") for n in (16, 9000)
    ]
    assert plans[0].workload == plans[1].workload
    longer = make_plan(make_config("Qwen2.5-VL-7B-Instruct", "sft", **{"plan.longest_response": 3048}), "sft")
    assert longer.workload.longest == plans[0].workload.longest + 1000


@pytest.mark.slow
@pytest.mark.parametrize("override", ["sampling.top_p=0.9", "sampling.top_k=20", "sampling.temperature=0"])
def test_what_rl_will_refuse_is_refused_here(tmp_path: Path, override: str):
    sampled = _run_file(tmp_path, sections="[rl]\n[reward]\nuse_judge = false\n")
    result = _plan(sampled, override)
    assert result.exit_code == 1
    assert override.partition("=")[0] in result.output
