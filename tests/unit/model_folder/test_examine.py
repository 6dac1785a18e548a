"""A model folder is examined before anything is loaded from it: what lacks is named, all of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from folders import write_folder

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch.stage_models import check_models
from megatron_r1reward.model_folder.examine import folder_problems, load_tokenizer, served_problems


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (("tokenizer.json",), "there is no tokenizer"),
        (("tokenizer.json", "tokenizer_config.json"), "tokenizer_config.json"),
        (("preprocessor_config.json",), "there is no image processor"),
        (("chat_template.jinja",), "there is no chat template"),
        (("model.safetensors",), "download the weights"),
        (("config.json",), "holds no config.json"),
    ],
)
def test_what_is_missing_stops_every_stage(missing: tuple[str, ...], words: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    assert list(folder_problems(folder)) == []
    for name in missing:
        (folder / name).unlink()
    assert words in "; ".join(folder_problems(folder))
    tree = {"run": {"output_dir": "x"}, "model": {"path": str(folder)}, "data": {"train": "x"}}
    for stage in ("sft", "rl", "eval"):
        with pytest.raises(ValueError, match=words):
            check_models(RunConfig.model_validate(tree | {"reward": {"use_judge": False}}), stage)


def test_parts_of_different_models_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 16, "merge_size": 2}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][1]["id"] = 30
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    problems = "\n".join(folder_problems(folder))
    assert "patch_size is 16, the model's is 14" in problems
    assert "has <|image_pad|> as 30, config.json's image_token_id is 25" in problems
    assert "ids up to 30, config.json's vocab_size is 26" in problems


def test_a_judge_may_be_of_any_family_and_has_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert len(list(served_problems(tmp_path))) == 2
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert list(served_problems(tmp_path)) == []


def test_a_chat_template_is_found_where_older_processors_saved_it(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(tiny_folder, folder)
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="there is no chat template"):
        load_tokenizer(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    assert list(folder_problems(folder)) == []
    assert load_tokenizer(folder).chat_template == text
