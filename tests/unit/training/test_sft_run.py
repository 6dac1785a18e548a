"""A whole SFT run of a tiny model: through the loop that it shares with RL."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1reward.config.schema import ParallelSection, RunConfig
from megatron_r1reward.conversion.convert import export_folder
from megatron_r1reward.data.preference import read_sft_examples
from megatron_r1reward.data.preference_row import SftExample
from megatron_r1reward.data.prompt import TEMPLATE
from megatron_r1reward.data.selection import SelectedRows
from megatron_r1reward.model_folder.prompt_policy import FILE, read_policy
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training import sft
from megatron_r1reward.training.supervised import select_together


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


def write_rows(folder: Path, questions: list[str]) -> None:
    rows = [
        {"id": str(number), "message": json.dumps([{"role": "user", "content": question}]),
         "image": [], "response": f"<think>The image shows {number}.</think><answer>1</answer>",
         "category": "low" if number < 4 else "high", "difficulty": 1 + number % 2}
        for number, question in enumerate(questions)
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_config(
    folder: Path, name: str, model: Path, *, steps: int, token_budget: int = 600, save_every: int = 100, **data: Any
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"output_dir": folder / name},
            "model": {"path": model, "precision": "fp32"},
            "data": {"train": folder / "train.jsonl", "token_budget": token_budget, "max_pixels": 40_000, **data},
            "sft": {"steps": steps, "global_batch_size": 4},
            "optimizer": {"lr": 3e-3, "warmup_fraction": 0.0, "schedule": "constant"},
            "checkpoint": {"save_every": save_every},
            "monitor": {"tensorboard": False},
        }
    )


@pytest.mark.slow
def test_the_trained_folder_says_how_it_is_asked(tiny_folder: Path, topology: Topology, tmp_path: Path) -> None:
    """And by what it was made, one stage after the other; a conversion of a checkpoint says the same."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    (base / "README.md").write_text("about the base model")
    write_rows(tmp_path, [TEMPLATE.format(question="Which?", answer1=str(n), answer2="no") for n in range(4)])
    once = sft.run(run_config(tmp_path, "once", base, steps=1, token_budget=4096), topology)
    assert once is not None and not (once / "README.md").exists()
    policy = read_policy(once)
    assert policy is not None
    assert (policy.template, policy.orders, policy.pixels) == (TEMPLATE, "both", (3136, 40_000))
    (stage,) = policy.stages
    assert (stage.stage, stage.base, stage.data, stage.rows, stage.steps) == ("sft", "base", "train.jsonl", 4, 1)
    twice = sft.run(run_config(tmp_path, "twice", once, steps=1, token_budget=4096, save_every=1), topology)
    assert twice is not None
    said = (twice / FILE).read_text()
    assert [one["base"] for one in json.loads(said)["stages"]] == ["base", "once/hf"]
    export_folder(tmp_path / "twice" / "checkpoints" / "step-00000001", tmp_path / "exported", progress=False)
    assert (tmp_path / "exported" / FILE).read_text() == said
    write_rows(tmp_path, ["Is the analysis consistent?"] * 4)  # a consistency judge, begun from a reward model
    judge = sft.run(run_config(tmp_path, "judge", twice, steps=1), topology)
    assert judge is not None and read_policy(judge) is None


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_where_it_was(tiny_folder: Path, topology: Topology, tmp_path: Path) -> None:
    """Asked to stop after the first step, then started again: the weights of the run that was left alone."""
    write_rows(tmp_path, [f"Which digit? {number}" for number in range(8)])

    def config(name: str) -> RunConfig:
        return run_config(tmp_path, name, tiny_folder, steps=3)

    assert sft.run(config("whole"), topology) == tmp_path / "whole" / "hf"
    stop = tmp_path / "stopped" / "live" / "stop.json"
    stop.parent.mkdir(parents=True)
    stop.write_text("{}")
    assert sft.run(config("stopped"), topology) is None
    assert not (tmp_path / "stopped" / "DONE").exists()
    stop.unlink()
    sft.run(config("stopped"), topology)
    for name in ("whole", "stopped"):
        logged = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in logged] == [1, 2, 3]
        assert all(row["time/step"] > 0 and "time/save" in row and "time/heldout" not in row for row in logged)
        assert json.loads((tmp_path / name / "DONE").read_text())["step"] == 3
    weights = [load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_run_trains_on_the_selected_rows_in_the_stages_of_its_curriculum(
    tiny_folder: Path, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second stage it goes on there, and not where the stages are others."""
    write_rows(tmp_path, [f"Which digit? {number}" for number in range(12)])
    stages = [{"until_step": 1, "difficulty": [1, 1]}, {}]
    drawn: list[str] = []
    real = sft.to_sequence
    monkeypatch.setattr(sft, "to_sequence", lambda state, row: (drawn.append(row.id), real(state, row))[1])

    def run(steps: int, **data: Any) -> None:
        given = {"categories": ["high"], "curriculum": stages, **data}
        sft.run(run_config(tmp_path, "run", tiny_folder, steps=steps, **given), topology)

    run(2)
    assert sorted(drawn[:4]) == ["10", "4", "6", "8"]
    assert set(drawn[4:]) <= {str(number) for number in range(4, 12)} and len(drawn) == 8
    drawn.clear()
    run(3)
    assert len(drawn) == 4 and not set(drawn) & {"0", "1", "2", "3"}
    with pytest.raises(ValueError, match=r"data.curriculum, or the rows of its stages, changed"):
        run(4, curriculum=[{"until_step": 1, "difficulty": [2, 2]}, {}])
    with pytest.raises(ValueError, match=r"data.categories: no row has 'hgih'; there are high, low"):
        run(4, categories=["hgih"])


def test_every_rank_trains_on_what_the_main_rank_selected(tmp_path: Path) -> None:
    """Only that one looks into files and pictures; the others get the names, or what is wrong."""
    write_rows(tmp_path, [f"Which digit? {number}" for number in range(8)])
    rows, sent = read_sft_examples(tmp_path / "train.jsonl").examples, []

    def select(topology: SimpleNamespace, **data: Any) -> SelectedRows[SftExample]:
        config = run_config(tmp_path, "run", tmp_path, steps=4, **data)
        return select_together(rows, frozenset(), config, config.sft, topology)  # type: ignore[arg-type]

    def send(message: Any) -> Any:
        sent.append(pickle.dumps(message))
        return message

    main = SimpleNamespace(is_main=True, from_main=send)
    other = SimpleNamespace(is_main=False, from_main=lambda nothing: pickle.loads(sent[-1]))
    for rank in (main, other):
        rank.decided_by_main = partial(Topology.decided_by_main, rank)  # type: ignore[arg-type]
    stages = {"categories": ["high"], "curriculum": [{"until_step": 2, "difficulty": [1, 1]}, {}]}
    found = select(main, **stages)
    assert [row.id for row in found.rows] == ["4", "5", "6", "7"]
    assert select(other) == found
    with pytest.raises(ValueError, match="no row has 'gone'") as told:
        select(main, categories=["gone"])
    with pytest.raises(ValueError, match="no row has 'gone'") as heard:
        select(other)
    assert str(told.value) == str(heard.value)
