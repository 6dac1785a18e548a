"""A trained folder is described, pushed and fetched; the Hub is a real HTTP server here that speaks its routes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import HubServer
from PIL import Image
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.config.load import load_config
from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.data.prompt import TEMPLATE
from megatron_r1reward.evaluation.result import Counts, EvaluationResult, ScalarEvaluation
from megatron_r1reward.hub_name import hub_name, local_folder, model_name
from megatron_r1reward.judging.reward_model import RewardModel
from megatron_r1reward.launch.stage_models import check_models
from megatron_r1reward.model_folder.prompt_policy import FILE, PromptPolicy, TrainedStage

NAME = "org/judge"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server, and a cache of this test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server = HubServer()
    yield server
    server.stop()


@pytest.fixture
def trained(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model as `rl` would have exported it."""
    folder = tmp_path / "runs" / "rl" / "hf"
    shutil.copytree(tiny_folder, folder)
    stages = [
        TrainedStage(stage="sft", version="0.2", base="org/base@v1", data="sft.jsonl", rows=9000, steps=400,
                     settings={"learning_rate": 3e-3}),
        TrainedStage(stage="rl", version="0.2", base="sft/hf", data="pool.jsonl", rows=800, steps=40,
                     settings={"method": "stable_reinforce", "max_tokens": 8}),
    ]  # fmt: skip
    policy = PromptPolicy(template=TEMPLATE, min_pixels=3136, max_pixels=501760, stages=tuple(stages))
    (folder / FILE).write_text(policy.to_json())
    return folder


def call(*arguments: object) -> tuple[int, str]:
    """Exit code, and what it says: results, or what is wrong."""
    result = CliRunner().invoke(app, ["hub", *map(str, arguments)])
    return result.exit_code, result.stdout if result.exit_code == 0 else result.stderr


def measured(folder: Path, place: Path) -> Path:
    """An evaluation.json of the folder's weights."""
    interval = (0.85, 0.94)
    result = EvaluationResult(
        accuracy=0.9, interval=interval,
        accuracy_by_order={"12": 0.91, "21": 0.89}, accuracy_by_order_intervals={"12": interval, "21": interval},
        order_consistency=0.95, order_consistency_interval=interval,
        unparsable_rate=0.0, unparsable_rate_interval=(0.0, 0.01), format_rate=1.0, format_rate_interval=(0.99, 1.0),
        answer_1_rate=0.5, counts=Counts(pairs=420, samples=840, failed=0),
        voting={"15": 0.98}, voting_intervals={"15": interval}, any_correct={}, any_correct_intervals={},
        mean_response_tokens=15.0, mean_response_tokens_interval=(14.0, 16.0), by_category={},
        weights=model_identity(folder), data="heldout.jsonl",
    )  # fmt: skip
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(result.to_json())
    return place


def test_a_card_says_what_the_run_recorded(trained: Path) -> None:
    measured(trained, trained.parents[1] / "eval_rl" / "evaluation.json")
    assert call("card", trained, "--name", NAME, "--license", "apache-2.0")[0] == 0
    card = (trained / "README.md").read_text()
    assert "license: apache-2.0" in card and "base_model: org/base\n" in card
    assert "| sft | org/base@v1 | sft.jsonl | 9000 | learning_rate 0.003 |" in card
    assert "method stable_reinforce" in card
    assert "| heldout.jsonl, 420 pairs | sampled, one response | 90.0 % [85.0, 94.0] | 91.0 % [85.0, 94.0] |" in card
    assert f"````text\n{TEMPLATE}\n````" in card
    assert str(trained) not in card
    assert call("card", trained)[0] == 0  # its own card is written anew


def test_a_scalar_model_has_a_card_of_its_own(trained: Path) -> None:
    """And `calibrate` says in one line why not."""
    said = PromptPolicy.model_validate_json((trained / FILE).read_text())
    (trained / FILE).write_text(said.model_copy(update={"kind": "scalar", "template": "{question}"}).to_json())
    place = measured(trained, trained.parents[1] / "eval_rm" / "evaluation.json")
    keys = ("accuracy", "interval", "accuracy_by_order", "accuracy_by_order_intervals", "order_consistency",
            "by_category", "counts", "weights", "data")  # fmt: skip
    kept = {key: json.loads(place.read_text())[key] for key in keys}
    cost = {"calls": 840, "tokens": 9, "seconds": 1.0}
    found = ScalarEvaluation(**kept, **cost, kind="scalar", calibration_error=0.1, calibration=(), absent={})
    place.write_text(found.to_json())
    assert call("card", trained, "--name", NAME)[0] == 0
    card = (trained / "README.md").read_text()
    assert "A scalar reward model" in card and "generative" not in card
    assert "| heldout.jsonl, 420 pairs | a number per response | 90.0 % [85.0, 94.0] | 90.0 % [85.0, 94.0] |" in card
    assert "model.score(" in card and "{question}" not in card
    refused = CliRunner().invoke(app, ["calibrate", str(trained), str(place)])
    assert (refused.exit_code, "is a scalar reward model, which has no votes" in refused.stderr) == (2, True)


def test_numbers_of_other_weights_are_not_on_the_card(trained: Path, tmp_path: Path) -> None:
    theirs = measured(trained, trained.parents[1] / "eval_sft" / "evaluation.json")
    theirs.write_text(theirs.read_text().replace(model_identity(trained), "0" * 32))
    assert call("card", trained)[0] == 0
    assert "None of these weights is recorded." in (trained / "README.md").read_text()
    code, output = call("card", trained, "--evaluation", theirs)
    assert code == 2 and "was measured on other weights" in output


def test_what_is_no_reward_model_or_has_another_card_is_refused(trained: Path, tiny_folder: Path) -> None:
    code, output = call("card", tiny_folder)
    assert code == 2 and f"has no {FILE}" in output
    (trained / "README.md").write_text("my own words")
    code, output = call("card", trained)
    assert code == 2 and "was not written by `hub card`" in output
    assert call("card", trained, "--force")[0] == 0


@pytest.mark.slow
def test_the_snippet_for_transformers_runs(trained: Path, tmp_path: Path) -> None:
    assert call("card", trained)[0] == 0
    snippets = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)
    space: dict = {}
    exec(snippets[0], space)
    image = tmp_path / "digit.png"
    Image.new("RGB", (56, 56), "white").save(image)
    answer, reply = space["judge"]("Which digit is it?", "It is 7.", "It is 3.", [str(image)])
    assert answer in (None, "1", "2") and isinstance(reply, str)
    compile(snippets[1], "vllm snippet", "exec")


@pytest.mark.slow
def test_a_pushed_model_comes_back_under_its_name(trained: Path, hub: HubServer, tmp_path: Path) -> None:
    code, output = call("push", trained, NAME, "--endpoint", hub.url, "--revision", "v1")
    assert code == 0, output
    commit = hub.commit_of(NAME, "v1")
    assert output.splitlines()[-1] == f"{NAME}@{commit}"
    assert hub.files(NAME, "v1")["README.md"].decode().count(NAME) > 2  # a card was written
    run = tmp_path / "run.toml"
    run.write_text(f'[run]\noutput_dir = "out"\n[model]\npath = "{NAME}@v1"\n[data]\ntrain = "pairs.jsonl"\n')
    with pytest.raises(ValueError, match=r"is not in this machine's Hugging Face cache: run `r1reward hub fetch org"):
        check_models(load_config(run), "eval")
    code, output = call("fetch", run, "--endpoint", hub.url)
    assert code == 0, output
    folder = load_config(run).model.path
    assert str(folder) == output.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hub.files(NAME, "v1")
    assert model_identity(folder) == model_identity(trained)
    assert model_name(folder) == f"{NAME}@{commit}"
    check_models(load_config(run), "eval")
    asked = len(hub.downloads)
    assert local_folder(f"{NAME}@{commit}") == folder
    with RewardModel.connect("http://127.0.0.1:9", folder=f"{NAME}@v1") as model:
        assert model.policy is not None and model.policy.template == TEMPLATE
    assert len(hub.downloads) == asked  # from the cache: compute nodes have no network


@pytest.mark.slow
def test_weights_go_over_the_lfs_protocol_and_come_back_equal(trained: Path, hub: HubServer, monkeypatch) -> None:
    """Weights are too large for a commit: uploaded by content, verified, named in the commit, fetched by content."""
    hub.large = (".safetensors",)
    code, output = call("push", trained, NAME, "--endpoint", hub.url)
    assert code == 2 and "set HF_HUB_DISABLE_XET=1 for a server that has only the LFS protocol" in output
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    code, output = call("push", trained, NAME, "--endpoint", hub.url)
    assert code == 0, output
    weights = (trained / "model.safetensors").read_bytes()
    oid = hashlib.sha256(weights).hexdigest()
    assert hub.lfs_calls == ["batch", f"PUT {oid}", f"verify {oid}"]
    assert hub.files(NAME)["model.safetensors"] == weights
    code, output = call("fetch", f"{NAME}@main", "--endpoint", hub.url)
    assert code == 0, output
    folder = Path(output.splitlines()[-1])
    assert (folder / "model.safetensors").read_bytes() == weights
    assert model_identity(folder) == model_identity(trained)
    (trained / "README.md").write_text((trained / "README.md").read_text() + "\nA word more.\n")
    assert call("push", trained, NAME, "--endpoint", hub.url)[0] == 0
    assert hub.lfs_calls[3:] in ([], ["batch"]), "what is there is not sent again"
    assert hub.files(NAME)["model.safetensors"] == weights


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("fetch", "org/none@main"), "there is no such repository"),
        (("fetch", f"{NAME}@none"), "there is no such revision"),
        (("fetch", "not a name"), "give ORG/NAME@REVISION"),
        (("push", "{trained}", "one-part"), "give ORG/NAME"),
    ],
)
def test_what_cannot_be_is_one_line(hub: HubServer, trained: Path, arguments, says) -> None:
    hub._keep(NAME, "main", {})
    given = [trained if one == "{trained}" else one for one in arguments]
    code, output = call(*given, "--endpoint", hub.url)
    assert code == 2
    assert says in output.splitlines()[-1]


@pytest.mark.slow
def test_who_may_not_write_hears_which_variable(hub: HubServer, trained: Path, monkeypatch) -> None:
    hub.refused = True
    code, output = call("push", trained, NAME, "--endpoint", hub.url)
    assert code == 2 and "403: set HF_TOKEN" in output
    hub.refused, hub.token = False, "secret"
    monkeypatch.setenv("MY_TOKEN", "secret")
    assert call("push", trained, NAME, "--endpoint", hub.url, "--token-variable", "MY_TOKEN")[0] == 0
    code, output = call("fetch", f"{NAME}@main", "--endpoint", "http://127.0.0.1:9")
    assert code == 2 and "cannot be reached" in output


def test_names(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/name@v1.0") == ("org/name", "v1.0")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name@v1.0").mkdir()
    assert hub_name("org/name@v1.0") is None  # a folder of that name comes first
    assert [hub_name(path) for path in ("runs/rl/hf", "name@main", "/abs/name@main", "org/name")] == [None] * 4
    assert [model_name(path) for path in ("/data/runs/rl/hf", "/models/Qwen2.5-VL-7B", "org/x@main")] == [
        "rl/hf", "Qwen2.5-VL-7B", "org/x@main",
    ]  # fmt: skip


def test_a_damaged_description_is_one_line(trained: Path) -> None:
    tree = json.loads((trained / FILE).read_text())
    (trained / FILE).write_text(json.dumps(tree | {"template": "{question} {answer1.x} {answer2}"}))
    code, output = call("card", trained)
    assert code == 2 and "a template holds each of" in output
