"""A folder that says how it is asked is asked like that, by whoever asks; other wishes are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted_server import ScriptedServer
from typer.testing import CliRunner

from megatron_r1reward import RewardModel, Votes
from megatron_r1reward.cli import app
from megatron_r1reward.config.schema import RunConfig, ServerSection
from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.judging import served
from megatron_r1reward.judging.ask import AskOptions
from megatron_r1reward.judging.judge_prompt import JudgePrompt
from megatron_r1reward.launch.stage_models import check_models
from megatron_r1reward.model_folder.prompt_policy import FILE, PromptPolicy
from megatron_r1reward.servers.process import VllmServer

FIRST = "<think>The first.</think><answer>1</answer>"
OTHER = "Q {question}\nA {answer1}\nB {answer2}\nWhich?"


def say(folder: Path, **changes: object) -> Path:
    policy = PromptPolicy.model_validate({"template": OTHER, "min_pixels": 800, "max_pixels": 90_000} | changes)
    (folder / FILE).write_text(policy.to_json())
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return say(tmp_path)


def shown(server: ScriptedServer) -> set[str]:
    return {request["messages"][0]["content"][-1]["text"] for request in server.requests}


def score(tmp_path: Path, *options: object):
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"question": "Which?", "responses": ["x", "y"]}) + "\n")
    return CliRunner().invoke(app, ["score", str(rows), str(tmp_path / "out.jsonl"), *map(str, options)])


def test_servers_at_urls_are_asked_with_the_folders_prompt(scripted, folder: Path) -> None:
    server = scripted(FIRST)
    with RewardModel.connect(server.url, folder=folder) as model:
        model.compare("Which?", ("x", "y"))
        with pytest.raises(ValueError, match='says orders "both": ask in both orders'):
            model.compare("Which?", ("x", "y"), votes=Votes(both_orders=False))
    assert shown(server) == {"Q Which?\nA x\nB y\nWhich?", "Q Which?\nA y\nB x\nWhich?"}


def test_score_asks_as_the_folder_says(scripted, folder: Path, tmp_path: Path) -> None:
    server = scripted(FIRST)
    refused = score(tmp_path, "--model", server.url, "--prompt-of", folder, "--one-order")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines() == [
        f'error: --one-order: the model\'s {FILE} says orders "both": ask in both orders, or set it to "any" there'
    ]
    assert server.requests == []
    assert score(tmp_path, "--model", server.url, "--prompt-of", folder).exit_code == 0
    assert len(shown(server)) == 2
    say(folder, orders="any")
    assert score(tmp_path, "--model", server.url, "--prompt-of", folder, "--one-order").exit_code == 0
    assert "is for servers" in score(tmp_path, "--model", folder, "--prompt-of", folder).stderr


def test_a_server_that_is_started_scales_images_as_training_did(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).symlink_to(path)
    say(folder)
    started: list[VllmServer] = []

    def start(servers: list[VllmServer], report: object) -> None:
        started.extend(servers)
        raise RuntimeError("far enough")

    monkeypatch.setattr(served, "start_servers", start)
    with pytest.raises(RuntimeError, match="far enough"):
        served.serve_folder(folder, ServerSection(), count=1, log_dir=tmp_path, options=AskOptions(), report=None)
    command = started[0]._command
    kwargs = json.loads(command[command.index("--mm-processor-kwargs") + 1])
    assert kwargs == {"min_pixels": 800, "max_pixels": 90_000}


def test_an_evaluation_with_other_image_sizes_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).symlink_to(path)
    say(folder)

    def config(**data: object) -> RunConfig:
        tree = {"run": {"output_dir": tmp_path}, "model": {"path": folder}, "data": {"train": tmp_path, **data}}
        return RunConfig.model_validate(tree)

    with pytest.raises(ValueError, match="says images of 800 to 90000 pixels, and"):
        check_models(config(), "eval")
    check_models(config(min_pixels=800, max_pixels=90_000), "eval")


def test_a_torn_file_is_named_before_a_server_starts(folder: Path) -> None:
    """The server said so, a minute later and in the middle of its log."""
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        RewardModel.from_pretrained(folder)


def test_the_prompt_is_no_part_of_the_weights_but_of_what_was_asked(scripted, folder: Path, tmp_path: Path) -> None:
    weights, server = model_identity(folder), scripted(FIRST)
    model = ("--model", server.url, "--prompt-of", folder)
    score(tmp_path, *model)
    say(folder, template=OTHER + " Say.")
    assert model_identity(folder) == weights
    score(tmp_path, *model)
    assert len(shown(server)) == 4
    say(folder, template=OTHER + " Say.", max_pixels=1000)
    score(tmp_path, *model)
    assert len(server.requests) == 4


def test_another_prompt_than_the_models_own_is_refused(scripted, folder: Path) -> None:
    other = AskOptions(prompt=JudgePrompt(turns=(("user", "{question} {response_1} {response_2}"),)))
    with pytest.raises(ValueError, match="has the prompt that it was trained with"):
        RewardModel.connect(scripted(FIRST).url, folder=folder, options=other)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ('{"format": 2, "template": "{question}{answer1}{answer2}"}', "format"),
        ('{"template": "{question} {answer1}"}', "a template holds each of"),
        ('{"template": "{question.x} {answer1} {answer2}"}', "a template holds each of"),
        ('{"template": "{question} {answer1} {answer2} {"}', "not a template"),
    ],
)
def test_what_cannot_be_read_is_one_line(folder: Path, text: str, says: str) -> None:
    (folder / FILE).write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        RewardModel.connect("http://127.0.0.1:9", folder=folder)
    assert "\n" not in str(error.value)
