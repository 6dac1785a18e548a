"""`r1reward sft` with Qwen3-VL: trains, saves, resumes and exports, with experts shared by two ranks; router losses
do not depend on the layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import parallel_parity as parity
import pytest
import torch
from corpus import CORPUS
from forked_ranks import run_ranks
from parity_layouts import EP2, PLAIN, SP, TP2, Layout
from transformers import AutoModelForImageTextToText

from megatron_r1reward.checkpoint.hf_model_io import HfReader, load_hf_weights
from megatron_r1reward.checkpoint.weight_exporter import export_hf_tensors
from megatron_r1reward.config.schema import MoeSection, ParallelSection, PrecisionSection, RunConfig
from megatron_r1reward.demo.tiny_models import TINY_SPECS, write_tiny_checkpoint
from megatron_r1reward.models.registry import family_of, load_hf_config
from megatron_r1reward.parallel import setup
from megatron_r1reward.training import sft

pytestmark = pytest.mark.parallel
LAYOUTS = {"qwen3_vl": TP2 | SP, "qwen3_vl_moe": EP2}


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("member") / "checkpoint"
    write_tiny_checkpoint(out, corpus=CORPUS, spec=TINY_SPECS[request.param])
    return out


@pytest.fixture(scope="module")
def data(image_paths: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "sft.jsonl"
    rows = []
    for number in range(8):
        paths = image_paths[: number % 3]
        content = [{"type": "image", "image": path} for path in paths]
        content.append({"type": "text", "text": f"Which digit is shown? {number}"})
        rows.append(
            {
                "id": str(number),
                "message": json.dumps([{"role": "user", "content": content}]),
                "image": list(paths),
                "response": f"<think>The image shows {number}.</think><answer>1</answer>",
            }
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run_sft(folder: Path, data: Path, out: Path, parallel: dict, steps: int) -> None:
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": str(out)},
            "model": {"path": str(folder), "precision": "fp32"},
            "data": {"train": str(data), "token_budget": 600, "image_root": "/"},
            "sft": {"steps": steps, "global_batch_size": 8},
            "optimizer": {"lr": 3e-3, "warmup_fraction": 0.0, "schedule": "constant"},
            "checkpoint": {"save_every": 100},
            "monitor": {"tensorboard": False},
            "profile": {"start_step": 2, "ranks": [1]},
            "parallel": parallel,
        }
    )
    sft.run(config, setup.initialize(config.parallel, seed=0))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["sft/loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_sft_learns_resumes_and_exports(folder: Path, data: Path, tmp_path: Path) -> None:
    parallel = LAYOUTS[load_hf_config(folder).model_type]
    run_ranks(run_sft, 2, folder, data, tmp_path / "through", parallel, 5)
    for steps in (3, 5):  # a run saves at its end
        run_ranks(run_sft, 2, folder, data, tmp_path / "resumed", parallel, steps)
    through, resumed = losses(tmp_path / "through"), losses(tmp_path / "resumed")
    assert len(through) == 5
    assert through[-1] < 0.9 * through[0]
    np.testing.assert_allclose(resumed, through, atol=1e-5)
    assert [path.name for path in (tmp_path / "through" / "profile").iterdir()] == ["rank1-step2.json"]
    before, after = HfReader(folder), HfReader(tmp_path / "through" / "hf")
    assert set(after.files) == set(before.files)
    for name in before.files:
        assert after[name].shape == before[name].shape
        assert not after[name].equal(before[name]), f"{name} did not train"
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "through" / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def exported(folder: Path, parallel: dict) -> dict[str, np.ndarray]:
    section = ParallelSection.model_validate(parallel)
    topology = setup.initialize(section, seed=0)
    hf = load_hf_config(folder)
    family = family_of(hf)
    table = family.weight_table(hf)
    configs = family.build_configs(hf, section, torch.float32, PrecisionSection(), MoeSection())
    model = family.build_model(configs, topology)
    load_hf_weights(model, folder, table)
    return {name: tensor.numpy().copy() for name, tensor in export_hf_tensors(model, table, topology)}


@pytest.mark.parametrize("parallel", [EP2, TP2 | SP, TP2 | SP | EP2], ids=["EP2", "TP2+SP", "TP2+SP+EP2"])
def test_shared_experts_come_back_byte_for_byte(parallel: dict, families: dict[str, Path]) -> None:
    folder = families["qwen3_vl_moe"]
    reader = HfReader(folder)
    main = run_ranks(exported, 2, folder, parallel)[0]
    assert set(main) == set(reader.files)
    for name, tensor in main.items():
        assert np.array_equal(tensor, reader[name].numpy()), name


@pytest.mark.parametrize("parallel", [TP2 | SP, TP2 | SP | EP2, {"context_parallel_size": 2}, {"recompute": "full"}])
def test_router_losses_do_not_depend_on_the_layout(parallel, families, parity_images) -> None:
    """The same micro-batches everywhere: the balance of a micro-batch is a property of the micro-batch."""
    moe = {"load_balancing": "aux_loss", "aux_loss_coefficient": 0.05, "z_loss_coefficient": 0.01}
    budget = 100_000
    runs = [
        run_ranks(parity.two_steps, ranks, families["qwen3_vl_moe"], parity_images, layout, budget)[0]
        for ranks, layout in (
            (1, Layout(ranks=1, parallel=PLAIN, moe=moe)),
            (1, Layout(ranks=1, parallel=PLAIN)),
            (1 if "recompute" in parallel else 2, Layout(ranks=2, parallel=parallel, moe=moe)),
        )
    ]
    balanced, unbalanced, layout = runs
    assert parity.within_goal(parity.compare(layout, balanced)), parity.compare(layout, balanced)
    assert not parity.within_goal(parity.compare(unbalanced, balanced)), "the losses have to move the gradients"
