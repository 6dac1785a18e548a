"""Tokens per second of one RL update, against the same update with transformers and TRL's GRPO loss.

    pip install -e .[bench]
    python benchmarks/rl_update_vs_trl.py [--active 0.25] [--repeats 3] [--json FILE] [--check]

Same checkpoint, sequences, old log-probs and per-token advantages; one optimizer step in float32 on one thread. A share
`--active` of the response tokens has an advantage, as after filtering. Both losses are printed: they have to agree.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import megatron_r1reward.parallel  # noqa: F401  (before megatron-core)

torch.set_num_threads(1)

import workload  # noqa: E402
from reporting import print_table, write_json  # noqa: E402

from megatron_r1reward.algorithm.policy_loss import aggregation_weights  # noqa: E402
from megatron_r1reward.training.policy_update import update_policy  # noqa: E402
from megatron_r1reward.training.rollout_batch import RolloutBatch, forward_log_probs  # noqa: E402
from megatron_r1reward.training.state import TrainState  # noqa: E402
from megatron_r1reward.types import Sequence  # noqa: E402

GOAL = 2.0
SHAPE = workload.Shape(prompts=2, samples=8, image_side=224, text_tokens=200, response_tokens=96)
MICRO_BATCH = 4  # sequences; TRL pads these, this package packs as many tokens
PAD = 0


def rollout_batch(state: TrainState, sequences: list[Sequence], active: float) -> RolloutBatch:
    """Old log-probs by a forward pass, advantages of +-1 on a random share of the response tokens."""
    cu_response = torch.tensor([0, *(s.response_length for s in sequences)]).cumsum(0)
    rows = int(cu_response[-1])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(rows, generator=generator) < active
    sign = torch.where(torch.rand(rows, generator=generator) < 0.5, -1.0, 1.0)
    batch = RolloutBatch(
        sequences=tuple(sequences),
        mini_batches=(tuple(range(len(sequences))),),
        rewards=torch.zeros(len(sequences)),
        cu_response=cu_response,
        aggregation=aggregation_weights(cu_response, state.config.algorithm),
        sampler_log_probs=torch.zeros(rows),
        advantages=torch.where(chosen, sign, 0.0),
    )
    old = forward_log_probs(state, batch, state.model)[0]
    return RolloutBatch(**{**batch.__dict__, "old_log_probs": old})


def build_trl(folder: Path, output: Path) -> Any:
    """A real GRPO trainer around the same checkpoint; only its loss is used."""
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from trl import GRPOConfig, GRPOTrainer

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    arguments = GRPOConfig(
        output_dir=str(output), use_cpu=True, bf16=False, beta=0.0, loss_type="grpo", num_generations=2,
        per_device_train_batch_size=MICRO_BATCH, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.model.train()
    return trainer


def trl_inputs(state: TrainState, batch: RolloutBatch, indices: list[int]) -> dict[str, Any]:
    """One padded micro-batch in TRL's layout: prompts padded on the left, completions on the right."""
    chosen = [batch.sequences[i] for i in indices]
    prompt_width = max(s.prompt_length for s in chosen)
    width = max(s.response_length for s in chosen)
    prompt_ids, completion_ids = (torch.full((len(chosen), w), PAD) for w in (prompt_width, width))
    prompt_mask, completion_mask = torch.zeros_like(prompt_ids), torch.zeros_like(completion_ids)
    advantages, old = (torch.zeros(len(chosen), width) for _ in range(2))
    assert batch.advantages is not None and batch.old_log_probs is not None
    for row, (index, sequence) in enumerate(zip(indices, chosen, strict=True)):
        prompt, response = sequence.prompt_length, sequence.response_length
        prompt_ids[row, prompt_width - prompt :] = torch.tensor(sequence.token_ids[:prompt])
        prompt_mask[row, prompt_width - prompt :] = 1
        completion_ids[row, :response] = torch.tensor(sequence.token_ids[prompt:])
        completion_mask[row, :response] = 1
        flat = batch.rows([index])
        advantages[row, :response], old[row, :response] = batch.advantages[flat], batch.old_log_probs[flat]
    images = [state.packer.image_processor(path) for s in chosen for path in s.image_paths]
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "pixel_values": torch.cat([image.pixel_values for image in images]),
        "image_grid_thw": torch.tensor([image.grid for image in images]),
        "num_images": [len(s.image_paths) for s in chosen],
        "mm_token_type_ids": (ids == state.packer.image_token_id).int(),
    }


def trl_update(trainer: Any, optimizer: torch.optim.Optimizer, micro_batches: list[dict[str, Any]]) -> float:
    """One optimizer step over all micro-batches; returns the loss."""
    trainer.current_gradient_accumulation_steps = len(micro_batches)
    optimizer.zero_grad()
    total = 0.0
    for inputs in micro_batches:
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    return total


def timed(update: Callable[[], float], repeats: int) -> tuple[float, float]:
    """(loss of the first update, median seconds of the later ones)."""
    first = update()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        update()
        times.append(time.perf_counter() - started)
    return first, workload.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--active", type=float, default=0.25, help="share of response tokens with an advantage")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--check", action="store_true", help=f"exit 1 below {GOAL}x or when the losses differ")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        workload.write_model(folder)
        state = workload.build(folder, 100_000, algorithm={"samples_per_prompt": SHAPE.samples})
        sequences = workload.sequences(state, SHAPE, Path(root) / "images")
        tokens = sum(len(s.token_ids) for s in sequences)
        packer = state.packer
        state.packer = type(packer)(**{**packer.__dict__, "token_budget": MICRO_BATCH * tokens // len(sequences)})
        batch = rollout_batch(state, sequences, arguments.active)
        ours = timed(lambda: update_policy(state, batch)["loss"], arguments.repeats)
        trainer = build_trl(folder, Path(root) / "trl")
        optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
        order = list(range(len(sequences)))
        parts = [trl_inputs(state, batch, order[i : i + MICRO_BATCH]) for i in range(0, len(order), MICRO_BATCH)]
        theirs = timed(lambda: trl_update(trainer, optimizer, parts), arguments.repeats)
    rows = [
        {"update": name, "loss": loss, "seconds": seconds, "tokens": tokens, "tokens/s": tokens / seconds}
        for name, (loss, seconds) in (("megatron_r1reward", ours), ("transformers + TRL", theirs))
    ]
    print_table(list(rows[0]), rows)
    write_json(arguments.json, "rl_update_vs_trl", rows, active=arguments.active, shape=vars(SHAPE), goal=GOAL)
    same = abs(ours[0] - theirs[0]) < 1e-4
    speedup = theirs[1] / ours[1]
    print(
        f"losses {'agree' if same else 'DIFFER'}; {speedup:.2f}x TRL's tokens per second at {arguments.active} active rows"
    )
    return 1 if arguments.check and not (same and speedup >= GOAL) else 0


if __name__ == "__main__":
    sys.exit(main())
