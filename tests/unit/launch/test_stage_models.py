"""What a stage says about the folders of its run file before a process starts or anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1reward.checkpoint.manifest import write_manifest
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch.stage_models import check_models, check_settings


@pytest.fixture(autouse=True)
def _in_a_folder_with_rows(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(folder)


def check(model: Path, first: Path) -> None:
    tree = {"run": {"output_dir": "unused"}, "model": {"path": model}, "data": {"train": "rows.jsonl"}, "sft": {}}
    check_models(RunConfig.model_validate(tree | {"checkpoint": {"init_from": first}}), "sft")


def test_a_folder_that_gives_no_first_weights_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint.init_from .*/gone cannot be used: there is no such folder: name"):
        check(tiny_folder, tmp_path / "gone")
    with pytest.raises(ValueError, match=r"it is a Hugging Face folder: name it as model.path, or what"):
        check(tiny_folder, tiny_folder)
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        check(tiny_folder, tmp_path)
    step = tmp_path / "checkpoints" / "step-00000007"
    step.mkdir(parents=True)
    (step / "weights").write_text("abc")
    write_manifest(step, {}, kind="training", run="a", step=7)
    with pytest.raises(ValueError, match=r"holds 1 checkpoints: name one of them, e.g. .*/checkpoints/step-00000007"):
        check(tiny_folder, step.parent)
    check(tiny_folder, step)
    (step / "weights").write_text("a")
    with pytest.raises(ValueError, match=r"weights has 1 bytes instead of 3: .*: copy it again, or name another"):
        check(tiny_folder, step)


def test_a_supervisor_loads_nothing_heavy() -> None:
    """It checks the run file and the models, and starts others: on a login node, and once per stage."""
    program = (
        "import sys, megatron_r1reward.launch.launch; "
        "heavy = {'torch', 'transformers', 'megatron.core', 'openai', 'vllm'} & set(sys.modules); assert not heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def settings(**sections: object) -> RunConfig:
    base = {"run": {"output_dir": "x"}, "model": {"path": "gone"}, "data": {"train": "gone.jsonl"}}
    return RunConfig.model_validate(base | sections)


def test_rows_that_are_not_there_are_said_with_the_model() -> None:
    both = {"data.train", "evaluation.data"}
    sections = {"evaluation": {"data": "held.parquet"}, "rl": {"heldout_every": 1}, "reward": {"use_judge": False}}
    for stage, keys in (
        ("sft", {"data.train"}),
        ("eval", {"evaluation.data"}),
        ("rl", both),
    ):
        with pytest.raises(ValueError, match=r"model.path gone cannot be used") as error:
            check_models(settings(**sections), stage)  # type: ignore[arg-type]
        said = {key for key in both if f"{key} cannot be used: " in str(error.value)}
        assert said == keys, stage
    inside = settings(cluster={"container_image": "any.sqsh"})  # its mounts alone may lead there
    with pytest.raises(ValueError, match=r"^model.path gone cannot be used"):
        check_models(inside, "sft")


@pytest.mark.parametrize(
    ("stage", "sections", "words"),
    [
        ("eval", {"evaluation": {"voting": [1, 20]}}, r"evaluation.voting \[20\] is more than evaluation.samples 15"),
        ("eval", {"sampling": {"temperature": 0.0}}, "temperature 0 draws 15 equal samples"),
        ("eval", {"rollout": {"max_num_seqs": 8}}, "evaluation.samples 15 is more than rollout.max_num_seqs 8"),
        (
            "rl",
            {"algorithm": {"samples_per_prompt": 16}, "rollout": {"max_num_seqs": 8}},
            "algorithm.samples_per_prompt 16 is more than rollout.max_num_seqs 8",
        ),
    ],
)
def test_samples_that_servers_cannot_draw_are_refused_before_there_are_servers(
    stage: str, sections: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_models(settings(**sections), stage)  # type: ignore[arg-type]


def test_a_difficulty_that_nobody_measured_is_refused_where_rows_do_not_say_it_themselves() -> None:
    tree = {"run": {"output_dir": "unused"}, "model": {"path": "unused"}, "data": {"train": "x", "difficulty": [1, 2]}}
    config = RunConfig.model_validate(tree)
    for stage in ("rl", "rm"):
        with pytest.raises(ValueError, match=r"data.difficulty needs data.attempts"):
            check_settings(config, stage)
    check_settings(config, "sft")
