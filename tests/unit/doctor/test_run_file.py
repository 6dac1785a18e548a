"""`r1reward doctor --run-file`: model folder, data, lengths and disk of a stage, everything at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.doctor import run_file
from megatron_r1reward.doctor.run_file import check_run_file, stage_of


def write_rows(path: Path) -> None:
    rows = [
        {"id": "good", "message": [{"role": "user", "content": "2 + 2?"}], "response": "<answer>1</answer>"},
        {"id": "long", "message": [{"role": "user", "content": "which? " * 9000}], "response": "<answer>1</answer>"},
        {"id": "blind", "message": [{"role": "user", "content": [{"type": "image"}]}], "response": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(model: Path, folder: Path) -> RunConfig:
    write_rows(folder / "train.jsonl")
    return RunConfig.model_validate(
        {
            "run": {"output_dir": str(folder / "run")},
            "model": {"path": str(model)},
            "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 4000},
            "sft": {},
        }
    )


def test_a_stage_that_can_start(tiny_folder: Path, tmp_path: Path) -> None:
    findings = {finding.check: finding for finding in check_run_file(config(tiny_folder, tmp_path), "sft")}
    assert findings["run.model"].level == findings["run.disk"].level == "ok"
    assert findings["run.data"].level == "warning"
    assert "1 usable rows, 2 set aside" in findings["run.data"].message
    assert "max_prompt_tokens" in findings["run.data"].message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl"], "the examination leaves nothing behind"


def test_everything_is_said_at_once(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (model / "preprocessor_config.json").unlink()
    (model / "tokenizer_config.json").unlink()
    (model / "chat_template.jinja").unlink()
    run = config(model, tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    free = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(run_file.shutil, "disk_usage", lambda place: free)
    texts = [finding.message for finding in check_run_file(run, "sft") if finding.level == "error"]
    for words in ("tokenizer_config.json", "chat template", "image processor", "no usable row", "GB free"):
        assert any(words in text for text in texts), (words, texts)


@pytest.mark.slow
def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl")
    path = tmp_path / "sft.toml"
    path.write_text(
        f'[run]\noutput_dir = "{tmp_path}/run"\n[model]\npath = "{tiny_folder}"\n'
        f'[data]\ntrain = "{tmp_path}/train.jsonl"\n[sft]\n'
    )
    arguments = ["doctor", "--run-file", str(path), "--quick", "--json", "--folder", str(tmp_path)]
    tree = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert {"run.model", "run.data", "run.disk"} <= {finding["check"] for finding in tree["findings"]}
    result = CliRunner().invoke(app, [*arguments, f"model.path={tmp_path}"])
    assert result.exit_code == 1
    assert "holds no config.json" in result.stdout
    assert CliRunner().invoke(app, ["doctor", "model.path=x"]).exit_code == 2


def test_a_run_file_names_its_stage(tiny_folder: Path, tmp_path: Path) -> None:
    run = config(tiny_folder, tmp_path)
    assert stage_of(run) == "sft"
    with pytest.raises(ValueError, match="--stage"):
        stage_of(RunConfig.model_validate(run.model_dump(exclude_unset=True) | {"rl": {}}))
