"""A run that goes on: with the same models wherever they lie now, and not with others under the same path."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_up_record import elsewhere, replay_config, write_made_up_record
from safetensors.torch import load_file, save_file

from megatron_r1reward.config.schema import ParallelSection, RunConfig
from megatron_r1reward.models.registry import load_hf_config
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training import rl
from megatron_r1reward.training.models_read import check_models_read, models_read

ALONE: Any = SimpleNamespace(is_main=True, from_main=lambda value: value)
ALONE.decided_by_main = partial(Topology.decided_by_main, ALONE)


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def other_weights(folder: Path) -> None:
    """In place: the same names, shapes and sizes."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file(tensors | {name: tensors[name] * 0.5}, file, metadata={"format": "pt"})


def record(config: RunConfig, images: tuple[str, ...]) -> None:
    """The same rollouts each time, as if sampled from this configuration's model."""
    assert config.rl.replay is not None
    shutil.rmtree(config.rl.replay, ignore_errors=True)
    write_made_up_record(config, images, image_token_id=load_hf_config(config.model.path).image_token_id)


def stopped_after_one_step(config: RunConfig, topology: Topology) -> None:
    stop = config.run.output_dir / "live" / "stop.json"
    stop.parent.mkdir(parents=True)
    stop.write_text("{}")
    assert rl.run(config, topology, None) is None
    stop.unlink()


@pytest.mark.slow
def test_a_moved_reference_goes_on_and_another_one_is_refused(
    tiny_folder: Path,
    image_paths: tuple[str, ...],
    topology: Topology,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The policy is held to a reference (KL in the loss), which every start reads again."""
    model = copied(tiny_folder, tmp_path / "model")
    config = replay_config(
        tmp_path, model, algorithm={"kl_loss_coefficient": 0.1, "mismatch_alarm": 100.0, "mismatch_share_alarm": 1.0},
        rl={"steps": 2, "rollout_batch_size": 4, "train_batch_size": 4, "replay": tmp_path / "record"},
    )  # fmt: skip
    record(config, image_paths)
    alone, moved = elsewhere(config, tmp_path / "alone"), tmp_path / "moved"
    rl.run(alone, topology, None)
    stopped_after_one_step(config, topology)

    copied(model, moved)
    other_weights(model)
    record(config, image_paths)
    with pytest.raises(
        ValueError, match=r"trained with other models \(the reference policy .* changed\): restore them, "
    ):
        rl.run(config, topology, None)
    here = elsewhere(config, config.run.output_dir, model={"path": moved})
    record(here, image_paths)
    with caplog.at_level(logging.WARNING):
        assert rl.run(here, topology, None) is not None
    assert "other models" not in caplog.text
    mine, theirs = (load_file(run.run.output_dir / "hf" / "model.safetensors") for run in (config, alone))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs), "as if it had never stopped nor moved"


def described(model: Path, folder: Path | None = None, **sections: dict[str, Any]) -> dict[str, str]:
    tree: dict[str, Any] = {
        "run": {"output_dir": "unused"}, "model": {"path": model}, "data": {"train": "unused"}, "rl": {},
        "judge": {"model_path": folder}, "reward": {"use_judge": folder is not None},
    }  # fmt: skip
    return models_read(RunConfig.model_validate(tree | sections), ALONE, rl=True)


def test_each_model_that_is_read_again_counts_by_content(tiny_folder: Path, tmp_path: Path) -> None:
    model, judge = copied(tiny_folder, tmp_path / "model"), copied(tiny_folder, tmp_path / "judge")
    then = described(model, judge)
    assert then.keys() == {"files", "judge"}
    moved = tmp_path / "elsewhere"
    shutil.copytree(judge, moved)
    assert described(copied(model, tmp_path / "model2"), moved) == then

    for url, name in (("http://a/v1", None), ("http://b/v1", None), ("http://a/v1", "x"), ("http://b/v1", "x")):
        found = described(model, reward={"use_judge": True}, judge={"urls": [url], "model": name})
        assert found["judge"] == (name or ""), "an endpoint is known by its name, wherever it is"

    other_weights(model)
    assert described(model, judge) == then, "without a reference, a checkpoint has replaced them"
    other_weights(judge)
    now = described(model, judge)
    with pytest.raises(ValueError, match=r"\(the judge changed\): restore them, or set checkpoint.same_models=false"):
        check_models_read(then, now, tmp_path, same=True)

    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"padding_side": "left"}))
    with pytest.raises(ValueError, match=r"chat template of model\.path changed"):
        check_models_read(then, described(model, judge), tmp_path, same=True)


def test_the_users_own_parts_count_by_what_they_say(tiny_folder: Path, tmp_path: Path) -> None:
    parts = {name: tmp_path / name for name in ("prompt.txt", "verdict.py", "rewards.py")}
    parts["prompt.txt"].write_text("{question} {answer1} {answer2}")
    parts["verdict.py"].write_text("def read(text): return 1\n")
    parts["rewards.py"].write_text("def mine(rows): return [0.0] * len(rows)\n")

    def found(folder: Path = tmp_path) -> dict[str, str]:
        term = {"name": "mine", "function": f"{folder / 'rewards.py'}:mine"}
        prompt = {"template": folder / "prompt.txt", "parser": f"{folder / 'verdict.py'}:read"}
        return described(tiny_folder, prompt=prompt, reward={"use_judge": False, "terms": [term]})

    then = found()
    (tmp_path / "moved").mkdir()
    for path in parts.values():
        shutil.copy(path, tmp_path / "moved")
    assert found(tmp_path / "moved") == then, "the same text is the same part, wherever it lies"
    check_models_read(then, found(), tmp_path, same=True)
    for name, text in (
        ("prompt.txt", "prompt.template"),
        ("verdict.py", "prompt.parser"),
        ("rewards.py", "the function of reward.terms mine"),
    ):
        was = parts[name].read_text()
        parts[name].write_text(was + "\n")
        with pytest.raises(ValueError, match=rf"\({text} changed\): restore them, or set checkpoint.same_models=false"):
            check_models_read(then, found(), tmp_path, same=True)
        parts[name].write_text(was)


def test_a_change_that_is_wanted_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    then = {"files": "a", "judge": "b"}
    for saved, now, text in (
        (then, {"files": "a", "judge": "c"}, "the judge changed"),
        (then, {"files": "a"}, "the judge is not used any more"),
        ({"files": "a"}, then, "the judge was not used then"),
        (None, then, "does not say which models"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_models_read(saved, now, tmp_path, same=False)
        assert text in caplog.text
    caplog.clear()
    check_models_read(then, dict(then), tmp_path, same=True)
    assert not caplog.text
