"""A whole run of a scalar reward model: trained, stopped, resumed, exported, converted, refused where it cannot go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open
from transformers import AutoModel

from megatron_r1reward.config.schema import ParallelSection, RunConfig
from megatron_r1reward.conversion.convert import export_folder, import_folder
from megatron_r1reward.conversion.inspect_folder import inspect
from megatron_r1reward.conversion.verify import verify
from megatron_r1reward.judging.served import policy_of
from megatron_r1reward.launch.stage_models import check_keys, check_models
from megatron_r1reward.model_folder.examine import check_served
from megatron_r1reward.model_folder.prompt_policy import read_policy
from megatron_r1reward.model_folder.shape import load_shape
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training import rm
from megatron_r1reward.training.schedule import complete
from megatron_r1reward.training.state import build_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.fixture(scope="module")
def rows(image_paths: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The better response says "yes"; pairs with and without an image, in both places, and one without a label."""
    path = tmp_path_factory.mktemp("pairs") / "train.jsonl"
    answers = ("yes, it is", "no, never")
    made = [
        {"id": str(n), "question": f"Which digit? {n}", "image": list(image_paths[:1]) if n % 2 else [],
         "response_1": answers[n % 4 // 2], "response_2": answers[1 - n % 4 // 2], "answer": 1 + n % 4 // 2}
        for n in range(12)
    ]  # fmt: skip
    made.append({**made[0], "id": "no label", "answer": None})
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def run_config(rows: Path, out: Path, model: Path, **sections: dict) -> RunConfig:
    tree = {
        "run": {"output_dir": out},
        "model": {"path": model, "precision": "fp32"},
        "data": {"train": rows, "token_budget": 300, "max_pixels": 40_000, "image_root": "/"},
        "reward_model": {"steps": 4, "global_batch_size": 4, "heldout_every": 2, "heldout_pairs": 6},
        "evaluation": {"data": rows, "image_root": "/"},
        "optimizer": {"lr": 3e-3, "warmup_fraction": 0.0, "schedule": "constant"},
        "checkpoint": {"save_every": 2},
        "monitor": {"tensorboard": False},
    }
    return RunConfig.model_validate({**tree, **{k: {**tree.get(k, {}), **v} for k, v in sections.items()}})  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, topology: Topology, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a two-layer head."""
    out = tmp_path_factory.mktemp("rm") / "run"
    assert rm.run(run_config(rows, out, tiny_folder, reward_model={"score_layers": 2}), topology) == out / "hf"
    return out


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_which_response_is_better(trained: Path, rows: Path) -> None:
    logged = metrics(trained)
    assert logged[0]["rm/loss"] == pytest.approx(0.693, abs=0.02)  # a new head scores everything near 0
    assert logged[-1]["rm/loss"] < 0.6
    assert logged[-1]["heldout/accuracy"] == 1.0
    assert "heldout/accuracy" not in logged[0]
    assert logged[-1]["rm/margin"] > 0 < logged[-1]["rm/reward_std"]
    (unusable,) = (trained / "quarantine.jsonl").read_text().splitlines()
    assert "answer is missing" in unusable


def test_a_run_that_is_stopped_goes_on_where_it_was(
    trained: Path, tiny_folder: Path, topology: Topology, rows: Path, tmp_path: Path
) -> None:
    config = run_config(rows, tmp_path, tiny_folder, reward_model={"score_layers": 2}, checkpoint={"save_every": 100})
    stop = tmp_path / "live" / "stop.json"
    stop.parent.mkdir()
    stop.write_text("{}")
    assert rm.run(config, topology) is None
    stop.unlink()
    rm.run(config, topology)
    weights = [load_file(run / "hf" / "model.safetensors") for run in (trained, tmp_path)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_folder_says_what_it_is(trained: Path) -> None:
    folder = trained / "hf"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForSequenceClassification"]
    assert (config["score_layers"], config["id2label"]) == (2, {"0": "reward"})
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"} <= names
    assert "lm_head.weight" not in names
    policy = read_policy(folder)
    assert policy is not None
    assert (policy.kind, policy.template, policy.stages[-1].stage) == ("scalar", "{question}", "rm")


def test_conversion_keeps_every_byte(trained: Path, tmp_path: Path) -> None:
    """Folder -> checkpoint -> folder, and the run's own checkpoint -> folder; `inspect` and `verify` know the head."""
    folder, checkpoint = trained / "hf", trained / "checkpoints" / "step-00000004"
    import_folder(folder, tmp_path / "megatron", progress=False)
    export_folder(tmp_path / "megatron", tmp_path / "back", progress=False)
    export_folder(checkpoint, tmp_path / "exported", progress=False)
    for name in ("model.safetensors", "config.json", "reward_model.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert load_shape(tmp_path / "exported").score_layers == 2
    ours, theirs = load_file(folder / "model.safetensors"), load_file(tmp_path / "exported" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for place in (folder, checkpoint, tmp_path / "megatron"):
        assert list(verify(place, against=folder)) == []
    assert inspect(folder)["head"] == inspect(checkpoint)["head"] == "scalar, two layers"


def test_the_reward_is_that_of_the_hidden_state_of_transformers(
    trained: Path, topology: Topology, rows: Path, tmp_path: Path
) -> None:
    """With an image, packed with others: the value at the last token, the end of the turn."""
    folder = trained / "hf"
    config = run_config(rows, tmp_path, folder)
    state = build_state(config, topology, optimizer_steps=1, score_layers=rm.head_layers(config))
    pairs = rm.read_training_preferences(config, "rm").preferences[:3]
    sequences = rm.to_sequences(state, pairs)
    assert all(sequence.token_ids[-1] == state.tokenizer.eos_token_id for sequence in sequences)
    rewards = rm.score_sequences(state, sequences)
    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(folder / "model.safetensors")
    for sequence, reward in zip(sequences, rewards, strict=True):
        ids, inputs = torch.tensor([sequence.token_ids]), {}
        if sequence.image_paths:
            image = state.packer.image_processor(sequence.image_paths[0])
            inputs = {"pixel_values": image.pixel_values, "image_grid_thw": torch.tensor([image.grid]),
                      "mm_token_type_ids": (ids == state.hf_config.image_token_id).int()}  # fmt: skip
        with torch.no_grad():
            hidden_H = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).last_hidden_state[0, -1]
        inner_H = torch.relu(tensors["score.0.weight"] @ hidden_H + tensors["score.0.bias"])
        expected = tensors["score.2.weight"] @ inner_H + tensors["score.2.bias"]
        assert reward == pytest.approx(float(expected), abs=2e-4)
    assert any(sequence.image_paths for sequence in sequences)


def test_a_scalar_folder_is_one_clear_line_elsewhere(trained: Path, rows: Path, tmp_path: Path) -> None:
    folder = trained / "hf"
    plain = run_config(rows, tmp_path, folder, reward_model={"steps": None, "global_batch_size": 256,
                       "heldout_every": None, "heldout_pairs": 128})  # fmt: skip
    judged = plain.evaluation.model_copy(update={"judge_filtered_votes": True})
    with pytest.raises(ValueError, match=r"model.path .*: it is a scalar reward model, which writes no text") as e:
        check_models(plain, "sft")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="it is a scalar reward model, which writes no text"):
        check_served(folder)
    assert (policy_of(folder) or pytest.fail("it says nothing")).kind == "scalar"
    check_served(folder, scalar=True)
    check_models(plain, "eval")
    with pytest.raises(ValueError, match=r"evaluation.judge_filtered_votes: the scalar reward model in .* writes no"):
        check_models(plain.model_copy(update={"evaluation": judged}), "eval")
    check_models(run_config(rows, tmp_path, folder), "rm")
    with pytest.raises(ValueError, match=r"reward_model.score_layers is 1, but the scalar head in .* has 2"):
        rm.head_layers(run_config(rows, tmp_path, folder, reward_model={"score_layers": 1}))


def test_keys_of_other_stages_are_refused(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    given = run_config(rows, tmp_path, tiny_folder, data={"swap": "never"}, sampling={"temperature": 0.5})
    with pytest.raises(ValueError, match=r"sampling.temperature, data.swap mean nothing to `r1reward rm`"):
        check_keys(given, "rm")
    with pytest.raises(ValueError, match=r"reward_model.steps, .* mean nothing to `r1reward sft`"):
        check_keys(run_config(rows, tmp_path, tiny_folder), "sft")
    check_keys(run_config(rows, tmp_path, tiny_folder), "rm")


def test_a_micro_batch_is_cut_between_pairs() -> None:
    assert complete([[0, 1, 2, 3, 4, 5]], 1, 3, 2) == [[0, 1], [2, 3], [4, 5]]
    assert complete([[0, 1]], 2, 1, 2) == [[0, 1], []]


def test_the_sum_of_a_micro_batch_and_its_count() -> None:
    """By hand: two pairs, one right by 2, one wrong by 1, with the margin 0.5."""
    values = torch.tensor([[3.0, 1.0, 0.0, 1.0]], requires_grad=True)
    loss, count, found = rm.bradley_terry(values, SimpleNamespace(num_tokens=9), margin=0.5)  # type: ignore[arg-type]
    expected = np.log1p(np.exp(-np.array([1.5, -1.5])))
    assert float(loss / count) == pytest.approx(expected.mean(), rel=1e-6)
    assert (found["right"], found["pairs"], found["margins"], found["rewards"]) == (1.0, 2, 1.0, 5.0)
    loss.backward()
    assert float(values.grad.sum()) == pytest.approx(0.0, abs=1e-7)  # the loss does not fix the level
