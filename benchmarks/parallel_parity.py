"""Loss and gradients of every parallel layout against a single process: two optimizer steps in fp32 on packed batches
of unequal lengths with and without images, on gloo ranks of this machine.

    python benchmarks/parallel_parity.py [--family qwen2_5_vl] [--layout TP2 ...] [--json FILE] [--check]

`loss` is the largest difference of the mean loss over both steps and `log-prob` that of any response token before the
first; `grad` and `vision grad` are the largest difference of any gradient element relative to the largest element of
its tensor, `grad norm` the relative difference of the norm.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import megatron_r1reward.parallel  # noqa: F401  (before megatron-core)

torch.set_num_threads(1)

from forked_ranks import run_ranks  # noqa: E402
from parity_layouts import LAYOUTS, SINGLE, Layout  # noqa: E402
from reporting import print_table, write_json  # noqa: E402

from megatron_r1reward.config.schema import RunConfig  # noqa: E402
from megatron_r1reward.demo.tiny_models import TinyQwen3Spec, TinySpec, write_tiny_checkpoint  # noqa: E402
from megatron_r1reward.models.base import chunks_of  # noqa: E402
from megatron_r1reward.parallel import setup  # noqa: E402
from megatron_r1reward.training.data_parallel import zero_gradients  # noqa: E402
from megatron_r1reward.training.schedule import (  # noqa: E402
    LossOutput,
    optimizer_step,
    reduce_statistics,
    run_micro_batches,
)
from megatron_r1reward.training.sft import cross_entropy  # noqa: E402
from megatron_r1reward.training.state import TrainState, build_state  # noqa: E402
from megatron_r1reward.types import PackedBatch, Prompt, Sequence  # noqa: E402

LOSS_GOAL, LOG_PROB_GOAL, GRAD_GOAL = 1e-5, 1e-4, 1e-4
NEGLIGIBLE = 1e-3  # of the largest gradient element: tensors below are compared with this instead of themselves
SEQUENCES = 8
BUDGET = 400
CORPUS = ["Which digit is shown? 0 1 2 3 4 5 6 7 8 9", "The image shows 7. Response 1 is better."] * 4


# Four layers, so that two stages can hold two chunks each; grouped queries. Qwen3-VL with a deepstack level that
# crosses the stage boundary, heads wider than hidden / heads, and one dense layer among the mixtures of experts.
_QWEN3 = TinyQwen3Spec(
    vocab_size=512, hidden_size=64, intermediate_size=160, num_layers=4, num_key_value_heads=2, head_dim=32,
    mrope_section=(6, 5, 5), vision_depth=4, vision_hidden_size=64, vision_intermediate_size=96,
    deepstack_blocks=(0, 1, 2),
)  # fmt: skip
FAMILIES: dict[str, TinySpec | TinyQwen3Spec] = {
    "qwen2_5_vl": TinySpec(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_layers=4, mrope_section=(2, 3, 3),
        vision_hidden_size=64, vision_intermediate_size=96,
    ),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": replace(_QWEN3, num_experts=4, mlp_only_layers=(2,)),
}  # fmt: skip
WITH_EXPERTS = frozenset({"qwen3_vl_moe"})


def write_family(name: str, folder: Path) -> None:
    """A random tiny checkpoint whose distributions are far from uniform."""
    write_tiny_checkpoint(folder, corpus=CORPUS, init_std=0.15, spec=FAMILIES[name])


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Two steps of one layout: (mean loss, gradient norm) of each, gradients under their Hugging Face names, and the
    log-probs of all responses before the first step, one array per sequence."""

    records: list[tuple[float, float]]
    gradients: list[dict[str, np.ndarray]]
    log_probs: dict[int, np.ndarray]


def applies(family: str, layout: Layout) -> bool:
    """Whether the family can run the layout: mixtures of experts under tensor parallelism need sequence parallelism."""
    if family not in WITH_EXPERTS:
        return not layout.needs_experts
    tensor_parallel = layout.parallel.get("tensor_model_parallel_size", 1) > 1
    return not tensor_parallel or bool(layout.parallel.get("sequence_parallel"))


def write_images(folder: Path) -> tuple[str, ...]:
    """Three grids with full and ragged windows."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    paths = []
    for index, size in enumerate([(56, 56), (168, 84), (140, 196)]):
        small = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        path = folder / f"{index}.png"
        small.resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return tuple(paths)


def build_sequences(state: TrainState, images: tuple[str, ...]) -> list[Sequence]:
    """Eight sequences of unequal lengths: with no, one and two images, some images shared, one long text."""
    sequences = []
    for number in range(SEQUENCES):
        paths = images[: number % 3] if number % 4 else ()
        picture = "<|vision_start|><|image_pad|><|vision_end|>"
        text = "<|im_start|>user\n" + picture * len(paths) + "Which digit?" * (70 if number == 4 else number)
        prompt = Prompt(
            id=str(number), preference_id=str(number), token_ids=tuple(state.tokenizer.encode(text)),
            image_paths=paths, label=1, swapped=False,
        )  # fmt: skip
        response = state.tokenizer.encode("The image shows 7. " * (1 + number % 5))
        sequences.append(state.packer.sequence(prompt, response))
    return sequences


def _complete_gradients(state: TrainState) -> None:
    """Under the distributed optimizer a rank holds its shard of the reduced gradients: gather the others' shards."""
    for chunk in chunks_of(state.model):
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def export_gradients(state: TrainState) -> dict[str, np.ndarray]:
    """Full gradients under Hugging Face names: exported like weights, in their place."""
    _complete_gradients(state)
    weights = {}
    for parameter in state.module.parameters():
        weights[parameter] = parameter.data
        gradient = parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)
        parameter.data = gradient.to(parameter.dtype).clone()
    named = {n: g.numpy().copy() for n, g in state.exporter.tensors()}
    for parameter, data in weights.items():
        parameter.data = data
    return named


def build(
    folder: Path, images: tuple[str, ...], layout: Layout, budget: int, score_layers: int = 0, **sections: Any
) -> tuple[TrainState, list[Sequence]]:
    """This rank's training state and the batch; `sections` of the run file beside the layout's."""
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"path": str(folder), "precision": "fp32", **layout.model},
            "data": {"train": "unused", "token_budget": budget},
            "optimizer": {"lr": 1e-3, "warmup_fraction": 0.0, "schedule": "constant", "clip_grad": 0.5, "eps": 1e-5},
            "parallel": layout.parallel,
            "precision": layout.precision,
            "moe": layout.moe,
            **sections,
        }
    )
    topology = setup.initialize(config.parallel, seed=0, deterministic=config.precision.deterministic)
    state = build_state(config, topology, optimizer_steps=2, score_layers=score_layers)
    return state, build_sequences(state, images)


def two_steps(folder: Path, images: tuple[str, ...], layout: Layout, budget: int = BUDGET) -> Trace:
    """Two optimizer steps on this rank. Gradients are returned by the main rank only."""
    state, sequences = build(folder, images, layout, budget)
    topology = state.topology
    mine = list(range(topology.data_parallel_rank, SEQUENCES, topology.data_parallel_size))
    log_probs = _log_probs(state, sequences, mine)
    records, gradients = [], []
    for _ in range(2):
        state.model.train()
        zero_gradients(state.model)
        state.optimizer.zero_grad()
        plan = state.packer.plan(sequences, mine)
        statistics = run_micro_batches(state, sequences, plan, cross_entropy, forward_only=False)
        total = reduce_statistics(state, statistics)
        named = export_gradients(state)
        gradients.append(named if topology.is_main else {})
        records.append((total["loss"] / total["tokens"], optimizer_step(state).grad_norm))
    return Trace(records=records, gradients=gradients, log_probs=log_probs)


def _log_probs(state: TrainState, sequences: list[Sequence], mine: list[int]) -> dict[int, np.ndarray]:
    """A forward-only pass: the old log-probs of an RL step, on every rank."""
    state.model.eval()

    def collect(output_2R: torch.Tensor, batch: PackedBatch) -> LossOutput:
        values = {i: output_2R[0, batch.response_sequence == i].detach().numpy().copy() for i in batch.sequence_indices}
        return output_2R.sum(), torch.tensor(1, dtype=torch.int), {"values": values}

    parts = run_micro_batches(state, sequences, state.packer.plan(sequences, mine), collect, forward_only=True)
    local = {index: values for part in parts for index, values in part["values"].items()}
    gathered: list[dict[int, np.ndarray]] = [{}] * state.topology.world_size
    dist.all_gather_object(gathered, local)
    return {index: values for rank in gathered for index, values in rank.items()}


def compare(got: Trace, reference: Trace) -> dict[str, float]:
    """Largest differences over both steps; see the module's docstring."""
    loss = norm = 0.0
    grad = {True: 0.0, False: 0.0}
    for (loss_a, norm_a), (loss_b, norm_b) in zip(got.records, reference.records, strict=True):
        loss, norm = max(loss, abs(loss_a - loss_b)), max(norm, abs(norm_a - norm_b) / norm_b)
    for step, expected in enumerate(reference.gradients):
        floor = NEGLIGIBLE * max(float(np.abs(g).max()) for g in expected.values())
        for name, gradient in expected.items():
            scale = max(float(np.abs(gradient).max()), floor)
            difference = float(np.abs(got.gradients[step][name] - gradient).max()) / scale
            vision = name.startswith(("visual.", "model.visual."))
            # Not max(): a NaN has to show.
            grad[vision] = difference if not difference <= grad[vision] else grad[vision]
    assert got.log_probs.keys() == reference.log_probs.keys()
    log_prob = max(float(np.abs(got.log_probs[i] - expected).max()) for i, expected in reference.log_probs.items())
    return {"loss": loss, "log-prob": log_prob, "grad": grad[False], "vision grad": grad[True], "grad norm": norm}


def within_goal(row: dict[str, float]) -> bool:
    """Whether a comparison meets the goals; False for NaN."""
    if not row["loss"] <= LOSS_GOAL or not row["log-prob"] <= LOG_PROB_GOAL:
        return False
    return max(row["grad"], row["vision grad"], row["grad norm"]) <= GRAD_GOAL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="qwen2_5_vl")
    parser.add_argument("--layout", action="append", choices=sorted(LAYOUTS), help="default: all; may be repeated")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--check", action="store_true", help="exit 1 when a layout misses the goal")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_family(arguments.family, Path(folder) / "tiny")
        images = write_images(Path(folder) / "images")
        reference = run_ranks(two_steps, 1, Path(folder) / "tiny", images, SINGLE, 100_000)[0]
        for name in arguments.layout or LAYOUTS:
            layout = LAYOUTS[name]
            if not applies(arguments.family, layout):
                continue
            got = run_ranks(two_steps, layout.ranks, Path(folder) / "tiny", images, layout, timeout_s=300)[0]
            row = compare(got, reference)
            rows.append({"layout": name, "ranks": layout.ranks, **row, "ok": within_goal(row)})
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), file=sys.stderr, flush=True)
    print_table(["layout", "ranks", "loss", "log-prob", "grad", "vision grad", "grad norm", "ok"], rows)
    write_json(
        arguments.json, "parallel_parity", rows, family=arguments.family, goals=[LOSS_GOAL, LOG_PROB_GOAL, GRAD_GOAL]
    )
    passed = sum(row["ok"] for row in rows)
    print(f"{arguments.family}: {passed} of {len(rows)} layouts equal a single process")
    return 1 if arguments.check and passed < len(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
