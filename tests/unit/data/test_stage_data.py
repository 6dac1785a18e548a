"""Rows are measured when they are read, by the limits of the stage that reads them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from megatron_r1reward.config.load import load_config
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.packing import expand_images
from megatron_r1reward.data.pixels import ImageProcessor
from megatron_r1reward.data.prompt import PromptBuilder
from megatron_r1reward.data.selection import keep_selected
from megatron_r1reward.data.stage_data import RowLimits, image_folders, read_stage, read_training_preferences
from megatron_r1reward.servers.build import common_folder


@pytest.fixture
def make(tmp_path: Path, tiny_folder: Path):
    """A run file over rows with answers of these lengths, and its overrides."""
    Image.new("RGB", (280, 140), "red").save(tmp_path / "a.png")
    text = "Die Antwort lautet siebzehn, weil zweimal acht sechzehn ist und eins dazu kommt. "

    def run(*lengths: int, overrides: tuple[str, ...] = ()) -> RunConfig:
        rows = [
            {"id": f"r{index}", "question": "Which?", "response_1": (text * 200)[:length], "response_2": "no",
             "answer": 1 + index % 2, "image": "a.png"}
            for index, length in enumerate(lengths)
        ]  # fmt: skip
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "run.toml").write_text(
            f'[run]\noutput_dir = "{tmp_path}/out"\n[model]\npath = "{tiny_folder}"\n'
            f'[data]\ntrain = "{tmp_path}/train.jsonl"\n[sampling]\nmax_tokens = 100\n'
        )
        return load_config(tmp_path / "run.toml", overrides)

    return run


def reasons(config: RunConfig) -> list[str]:
    lines = (config.run.output_dir / "quarantine.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines]


@pytest.mark.parametrize("stage", ["rl", "annotate"])
def test_long_prompts_are_set_aside_when_the_data_are_read(make, stage: str) -> None:
    config = make(20, 12_000, 30, overrides=("data.max_prompt_tokens=1000",))
    (result,) = read_stage(config, stage).values()
    assert [row.id for row in result.preferences] == ["r0", "r2"]
    assert result.set_aside == {"r1"}
    (reason,) = reasons(config)
    assert "data.max_prompt_tokens is 1000" in reason


def test_what_servers_hold_counts_images_and_room_for_the_response(make, tiny_folder: Path) -> None:
    config = make(300, 3_000)
    preferences = read_training_preferences(config, "rl").preferences
    processor = ImageProcessor(tiny_folder, min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels)
    from transformers import AutoTokenizer

    builder = PromptBuilder(AutoTokenizer.from_pretrained(tiny_folder), 10_000)
    image_id = builder._image_id
    lengths = []
    for preference in preferences:
        images = [processor.num_tokens(processor(path)) for path in preference.image_paths]
        prompts = [builder.build(preference, swapped=swapped).token_ids for swapped in (False, True)]
        lengths.append(max(len(expand_images(prompt, images, image_id)) for prompt in prompts))
    exact = lengths[1] + 100  # sampling.max_tokens
    for limit, kept in ((exact, 2), (exact - 1, 1)):
        config = make(300, 3_000, overrides=(f"rollout.max_model_len={limit}",))
        assert len(read_training_preferences(config, "rl").preferences) == kept
    assert f"{exact} tokens" in reasons(config)[0]
    assert f"rollout.max_model_len is {exact - 1}" in reasons(config)[0]


def test_supervised_rows_and_remote_annotation_have_limits_of_their_own(make, tmp_path: Path) -> None:
    config = make(20, 14_000)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("".join(
        json.dumps({"id": row["id"], "message": [{"role": "user", "content": "Why?"}], "response": row["response_1"]})
        + "\n" for row in rows
    ))  # fmt: skip
    (result,) = read_stage(config, "sft").values()
    assert [row.id for row in result.examples] == ["r0"]
    assert "max_position_embeddings" in reasons(config)[0]
    assert "response" in reasons(config)[0]
    remote = make(20, 14_000, overrides=("annotate.url=https://host/v1",))
    (result,) = read_stage(remote, "annotate").values()
    assert len(result.preferences) == 2  # how much the remote model takes is not ours to say


def test_texts_that_surely_fit_are_not_tokenized(make, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = RowLimits.of(make(20), "rl")
    measured = []
    monkeypatch.setattr(RowLimits, "_problem", lambda *arguments: measured.append(arguments) or "")
    config = make(20, 200, 12_000)
    assert limits.prompt_tokens == 20_480
    read_training_preferences(config, "rl")
    assert len(measured) == 1


def test_a_selection_may_name_rows_that_are_set_aside_now(make, tmp_path: Path, caplog) -> None:
    config = make(20, 12_000, overrides=("data.max_prompt_tokens=1000",))
    data = read_training_preferences(config, "rl")
    select = tmp_path / "hard.json"
    select.write_text('["r0", "r1"]')
    with caplog.at_level(logging.WARNING):
        assert [row.id for row in keep_selected(data.preferences, select, set_aside=data.set_aside)] == ["r0"]
    assert "1 of 2 rows are in the quarantine file" in caplog.text
    select.write_text('["r1"]')
    with pytest.raises(ValueError, match="no row is left"):
        keep_selected(data.preferences, select, set_aside=data.set_aside)
    select.write_text('["r0", "unknown"]')
    with pytest.raises(ValueError, match="1 ids are not in"):
        keep_selected(data.preferences, select, set_aside=data.set_aside)


def test_servers_may_read_what_links_lead_to(make, tmp_path: Path) -> None:
    scratch = tmp_path.parent / f"{tmp_path.name}-scratch"
    scratch.mkdir()
    Image.new("RGB", (56, 56)).save(scratch / "blob", "PNG")
    config = make(20)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").symlink_to(scratch / "blob")
    assert scratch in image_folders(config)
    assert common_folder(image_folders(config)) == tmp_path.parent
    assert len(read_training_preferences(config, "rl").preferences) == 1
    row = json.loads((tmp_path / "train.jsonl").read_text())
    (tmp_path / "train.jsonl").write_text(json.dumps({**row, "image": str(scratch / "blob")}) + "\n")
    with pytest.raises(ValueError, match="leaves the image root"):  # a row cannot name what no link and no option does
        read_training_preferences(config, "rl")
    wider = make(20, overrides=(f'data.image_roots=["{scratch}"]',))
    (tmp_path / "train.jsonl").write_text(json.dumps({**row, "image": str(scratch / "blob")}) + "\n")
    assert len(read_training_preferences(wider, "rl").preferences) == 1
