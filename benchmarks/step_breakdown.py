"""Share of a training step in the LM head and the vision tower, before and after two savings: the head on response rows
only, and an image shared by samples encoded once.

    python benchmarks/step_breakdown.py [--samples 4] [--repeats 3] [--json FILE] [--check]

A step is forward and backward of one micro-batch, on one thread. Head and tower are timed alone on the same inputs. The
head "before" is this package's on every row: its backward leaves out rows without a gradient, which logits and autograd
would multiply too.
Seconds are processor time of that thread, the median of rounds in which the variants take turns: on an idle machine the
same as wall time, and little moved by other processes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import megatron_r1reward.parallel  # noqa: F401  (before megatron-core)

torch.set_num_threads(1)

import workload  # noqa: E402
from reporting import print_table, write_json  # noqa: E402

from megatron_r1reward.training.state import TrainState  # noqa: E402
from megatron_r1reward.types import PackedBatch, Sequence  # noqa: E402

BUDGET = 100_000


def without_savings(state: TrainState, batch: PackedBatch, sequences: list[Sequence]) -> PackedBatch:
    """The same batch with log-probs of every token and one copy of the image per sequence."""
    images = [state.packer.image_processor(path) for sequence in sequences for path in sequence.image_paths]
    return replace(
        batch,
        response_positions=torch.arange(batch.num_tokens - 1),
        targets=batch.input_ids[0, 1:],
        pixel_values=torch.cat([image.pixel_values for image in images]),
        image_grid_thw=torch.tensor([image.grid for image in images]),
        image_rows=None,
    )


Work = Callable[[], torch.Tensor]


def parts_of_step(state: TrainState, batch: PackedBatch, rows_R: torch.Tensor) -> dict[str, Work]:
    """Head, tower and whole step of one micro-batch. `rows_R`: which of its log-probs carry a loss."""
    model = state.module
    weights_R = torch.zeros(batch.targets.numel())
    weights_R[rows_R] = 1.0
    hidden_RH = torch.randn(batch.targets.numel(), model.config.hidden_size, requires_grad=True)
    assert batch.pixel_values is not None
    return {
        "head": lambda: (model.language_model.output_layer(hidden_RH, batch.targets)[0] * weights_R).sum(),
        "tower": lambda: model.vision(batch.pixel_values, batch.image_grid_thw).sum(),
        "step": lambda: (model(batch)[0] * weights_R).sum(),
    }


def measure(variants: dict[str, dict[str, Work]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of forward and backward of every part of every variant, which take turns."""
    times: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name, parts in variants.items()}
    for _ in range(repeats + 1):  # the first warms up
        for name, parts in variants.items():
            for part, work in parts.items():
                started = time.process_time()
                work().backward()
                times[name][part].append(time.process_time() - started)
    return {name: {part: workload.median(t[1:]) for part, t in parts.items()} for name, parts in times.items()}


def row(name: str, batch: PackedBatch, seconds: dict[str, float]) -> dict[str, Any]:
    assert batch.pixel_values is not None
    return {
        "variant": name,
        "tokens": batch.num_tokens,
        "head rows": batch.targets.numel(),
        "patches": batch.pixel_values.shape[0],
        "step s": seconds["step"],
        "LM head %": 100 * seconds["head"] / seconds["step"],
        "vision %": 100 * seconds["tower"] / seconds["step"],
        "tokens/s": batch.num_tokens / seconds["step"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4, help="samples of one prompt")
    parser.add_argument("--image-side", type=int, default=448)
    parser.add_argument("--text-tokens", type=int, default=300)
    parser.add_argument("--response-tokens", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--check", action="store_true", help="exit 1 when a saving does not shorten the step")
    arguments = parser.parse_args()
    shape = workload.Shape(
        prompts=1, samples=arguments.samples, image_side=arguments.image_side, text_tokens=arguments.text_tokens,
        response_tokens=arguments.response_tokens,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        workload.write_model(Path(folder) / "model")
        state = workload.build(Path(folder) / "model", BUDGET)
        sequences = workload.sequences(state, shape, Path(folder) / "images")
        after = state.packer.pack(sequences, range(len(sequences)))
        before = without_savings(state, after, sequences)
        response = after.response_positions
        every = torch.arange(after.targets.numel())
        images = replace(before, response_positions=after.response_positions, targets=after.targets)
        variants = {
            "neither": (before, response),
            "response rows gathered": (images, every),
            "and shared images once": (after, every),
        }
        works = {name: parts_of_step(state, batch, rows_R) for name, (batch, rows_R) in variants.items()}
        measured = measure(works, arguments.repeats)
    rows = [row(name, batch, measured[name]) for name, (batch, _) in variants.items()]
    print_table(list(rows[0]), rows)
    write_json(arguments.json, "step_breakdown", rows, shape=vars(shape))
    speedup = rows[0]["step s"] / rows[-1]["step s"]
    print(f"both savings: {speedup:.2f}x the tokens per second")
    ordered = rows[0]["step s"] > rows[1]["step s"] > rows[2]["step s"]
    return 1 if arguments.check and not ordered else 0


if __name__ == "__main__":
    sys.exit(main())
