"""A mid-size model trained for 50 steps in each precision: local layers in bf16, Transformer Engine in bf16, and every
FP8 recipe that the device has. Step time, memory, and the loss curve against local bf16.

    python benchmarks/precision_training.py [--steps 50] [--variant NAME ...] [--json FILE] [--check]
    python benchmarks/precision_training.py --dry-run      # any device: three steps of a tiny model

Every variant trains the same checkpoint on the same batches, in a process of its own, with the trainer's own step
(forward, backward, clip, Adam). A variant that this device or installation cannot run is listed with the reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked_ranks import run_ranks
from reporting import print_table, write_json

import megatron_r1reward.parallel  # noqa: F401  (before megatron-core)

torch.set_num_threads(1)

import workload  # noqa: E402

from megatron_r1reward.demo.tiny_models import TinySpec, write_tiny_checkpoint  # noqa: E402
from megatron_r1reward.training.schedule import reduce_statistics, train_micro_batches  # noqa: E402
from megatron_r1reward.training.sft import cross_entropy  # noqa: E402

# About 0.5 billion parameters: sizes that every FP8 recipe takes, head and tower in the proportions of real models.
MID = TinySpec(
    hidden_size=2048, intermediate_size=5632, num_layers=8, num_heads=16, num_key_value_heads=4,
    mrope_section=(16, 24, 24), vision_hidden_size=640, vision_intermediate_size=1792, vision_num_heads=8,
    vision_depth=4, vision_full_attention_blocks=(3,), vision_window_size=112, pad_vocab_to=32_768,
    max_pixels=28 * 28 * 1024,
)  # fmt: skip
TINY = TinySpec(hidden_size=128, num_layers=2)
SHAPE = workload.Shape(prompts=8, samples=1, image_side=448, text_tokens=1000, response_tokens=500)
TINY_SHAPE = workload.Shape(prompts=2, samples=1, image_side=112, text_tokens=40, response_tokens=20)
BATCHES = 4  # shown in turn, so that the loss falls
WARM_UP = 5  # steps that are not timed
LAST = 10  # steps whose mean loss is compared
LOSS_GOAL = {"te bf16": 0.01, "fp8": 0.03}  # of the mean loss of the last steps under local bf16

TE = {"transformer_impl": "transformer_engine"}
VARIANTS: dict[str, dict[str, Any]] = {
    "local bf16": {},
    "te bf16": TE,
    "te fp8 delayed": TE | {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "te fp8 tensorwise": TE | {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True},
    "te fp8 blockwise": TE | {"fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param_gather": True},
    "te fp8 mxfp8": TE | {"fp8": "e4m3", "fp8_recipe": "mxfp8", "fp8_param_gather": True},
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one variant did; `refused`: why it did not run."""

    losses: list[float]
    seconds: list[float]
    tokens: int  # of one step
    peak_bytes: int | None
    refused: str | None = None


def train(folder: Path, precision: dict[str, Any], steps: int, shape: workload.Shape, scratch: Path) -> Curve:
    """`steps` optimizer steps in this process."""
    try:
        state = workload.build(
            folder, 16_384, model={"path": str(folder), "precision": "bf16"}, precision=precision,
            optimizer={"lr": 1e-4, "warmup_fraction": 0.0, "schedule": "constant"},
        )  # fmt: skip
    except ValueError as error:
        return Curve(losses=[], seconds=[], tokens=0, peak_bytes=None, refused=str(error))
    on_gpu = state.topology.device.type == "cuda"
    sequences = workload.sequences(state, shape, scratch)
    batches = [range(number, len(sequences), min(BATCHES, len(sequences))) for number in range(BATCHES)]
    batches = [list(batch) for batch in batches if batch]
    losses, seconds = [], []
    for step in range(steps):
        if on_gpu and step == min(WARM_UP, steps - 1):
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        plan = state.packer.plan(sequences, batches[step % len(batches)])
        statistics, outcome = train_micro_batches(state, sequences, plan, cross_entropy)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        assert not outcome.skipped, f"the gradient norm of step {step} is {outcome.grad_norm}"
        total = reduce_statistics(state, statistics)
        losses.append(total["loss"] / total["tokens"])
    tokens = sum(len(sequences[i].token_ids) for i in batches[0])
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return Curve(losses=losses, seconds=seconds, tokens=tokens, peak_bytes=peak)


def row(name: str, curve: Curve, reference: Curve) -> dict[str, Any]:
    """One variant in the table; losses against local bf16."""
    if curve.refused is not None:
        return {"variant": name, "within goal": None, "not run": curve.refused}
    step = workload.median(curve.seconds[min(WARM_UP, len(curve.seconds) - 1) :])
    last, expected = (workload.mean(c.losses[-LAST:]) for c in (curve, reference))
    difference = abs(last - expected) / expected
    goal = next((goal for kind, goal in LOSS_GOAL.items() if kind in name), 0.0)
    return {
        "variant": name,
        "step s": step,
        "tokens/s": curve.tokens / step,
        "peak GiB": None if curve.peak_bytes is None else curve.peak_bytes / 2**30,
        "first loss": curve.losses[0],
        "last loss": last,
        "difference %": 100 * difference,
        "within goal": difference <= goal,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="default: all; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="three steps of a tiny model; no figure is of any use")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--check", action="store_true", help="exit 1 when a loss curve misses its goal")
    arguments = parser.parse_args()
    steps, spec, shape = (3, TINY, TINY_SHAPE) if arguments.dry_run else (arguments.steps, MID, SHAPE)
    names = list(dict.fromkeys(["local bf16", *(arguments.variant or VARIANTS)]))
    curves: dict[str, Curve] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        write_tiny_checkpoint(folder, corpus=workload.CORPUS, init_std=0.02, spec=spec)
        for number, name in enumerate(names):
            print(f"running {name}", file=sys.stderr, flush=True)
            scratch = Path(root) / str(number)
            curves[name] = run_ranks(train, 1, folder, VARIANTS[name], steps, shape, scratch, timeout_s=300.0)[0]
    rows = [row(name, curve, curves["local bf16"]) for name, curve in curves.items()]
    columns = ("variant", "step s", "tokens/s", "peak GiB", "first loss", "last loss", "difference %", "within goal")
    print_table(columns, rows)
    for line in rows:
        if "not run" in line:
            print(f"{line['variant']} did not run: {line['not run']}")
    if not arguments.dry_run:
        losses = {name: curve.losses for name, curve in curves.items()}
        write_json(arguments.json, "precision_training", rows, steps=steps, shape=vars(shape), losses=losses)
    ran = [line for line in rows if "not run" not in line]
    good = sum(bool(line["within goal"]) for line in ran)
    print(f"{len(ran)} of {len(rows)} variants ran, {good} with the loss curve of local bf16")
    return 1 if arguments.check and not arguments.dry_run and good < len(ran) else 0


if __name__ == "__main__":
    sys.exit(main())
