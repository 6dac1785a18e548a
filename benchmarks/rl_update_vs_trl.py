"""Tokens per second of one RL update, against the same update with transformers and TRL's GRPO loss.

    pip install -e .[bench]
    python benchmarks/rl_update_vs_trl.py [--active 0.25] [--repeats 3] [--json FILE] [--check]

Same checkpoint, sequences, old log-probs and per-token advantages; one optimizer step in float32 on one thread. A share
`--active` of the response tokens has an advantage. An outcome reward gives all tokens of a response the same advantage,
so the others are whole responses: samples of a prompt that all earned the same, or filtered ones ("responses"). The row
"tokens" scatters them over all responses instead, and the first has an advantage everywhere.

TRL runs as it is: its loss with its fused LM head over the completions, padded micro-batches of the same number of
sequences, the image of every sample through the tower. Both losses are printed: they have to agree. Seconds are
processor time of the one thread, medians of rounds in which both take turns: on an idle machine the same as wall time.
"""

from __future__ import annotations

import argparse
import os
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

from megatron_r1reward.algorithm.policy_loss import aggregation_weights  # noqa: E402
from megatron_r1reward.training.policy_update import update_policy  # noqa: E402
from megatron_r1reward.training.rollout_batch import RolloutBatch, forward_log_probs  # noqa: E402
from megatron_r1reward.training.state import TrainState  # noqa: E402
from megatron_r1reward.types import Sequence  # noqa: E402

GOAL = 2.0  # where the quarter of active rows is made of whole responses
SHAPE = workload.Shape(prompts=4, samples=4, image_side=224, text_tokens=200, response_tokens=96)
MICRO_BATCH = 4  # sequences; TRL pads these, this package packs as many tokens
PAD = 0
LEARNING_RATE = 1e-6


def rollout_batch(state: TrainState, sequences: list[Sequence]) -> RolloutBatch:
    """Old log-probs by a forward pass; advantages follow."""
    cu_response = torch.tensor([0, *(s.response_length for s in sequences)]).cumsum(0)
    rows = int(cu_response[-1])
    batch = RolloutBatch(
        sequences=tuple(sequences),
        mini_batches=(tuple(range(len(sequences))),),
        rewards=torch.zeros(len(sequences)),
        cu_response=cu_response,
        aggregation=aggregation_weights(cu_response, state.config.algorithm),
        sampler_log_probs=torch.zeros(rows),
    )
    return replace(batch, old_log_probs=forward_log_probs(state, batch, state.model)[0])


def with_advantages(batch: RolloutBatch, active: float, kind: str) -> RolloutBatch:
    """Advantages of +-1 on a share of the response tokens, by the kind of row: "all", "responses" or "tokens"."""
    rows, responses = int(batch.cu_response[-1]), len(batch.sequences)
    generator = torch.Generator().manual_seed(0)
    sign_R = torch.where(torch.rand(rows, generator=generator) < 0.5, -1.0, 1.0)
    chosen_R = torch.ones(rows, dtype=torch.bool)
    if kind == "tokens":
        chosen_R = torch.rand(rows, generator=generator) < active
    elif kind == "responses":  # whole groups: samples of one prompt stand next to each other
        chosen_R = (torch.arange(responses) < active * responses).repeat_interleave(batch.cu_response.diff())
    return replace(batch, advantages=torch.where(chosen_R, sign_R, 0.0))


def build_trl(folder: Path, output: Path) -> Any:
    """A real GRPO trainer around the same checkpoint; only its loss is used."""
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise SystemExit(f"{error}: this comparison needs TRL; pip install -e .[bench]") from error

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


def take_turns(updates: dict[str, Callable[[], float]], repeats: int) -> dict[str, tuple[float, float]]:
    """(loss of the first round, median processor seconds of the later ones) of every update."""
    losses: dict[str, list[float]] = {name: [] for name in updates}
    times: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(repeats + 1):
        for name, update in updates.items():
            started = time.process_time()
            losses[name].append(update())
            times[name].append(time.process_time() - started)
    return {name: (losses[name][0], workload.median(times[name][1:])) for name in updates}


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
        state.packer = replace(state.packer, token_budget=MICRO_BATCH * tokens // len(sequences))
        trainer = build_trl(folder, Path(root) / "trl")
        optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        batch = rollout_batch(state, sequences)
        rows = []
        for kind in ("all", "tokens", "responses"):
            rows.append(compare(state, trainer, optimizer, with_advantages(batch, arguments.active, kind), arguments))
            rows[-1] = {"active rows": "all" if kind == "all" else f"{arguments.active:g} of {kind}", **rows[-1]}
    print_table(list(rows[0]), rows)
    write_json(arguments.json, "rl_update_vs_trl", rows, active=arguments.active, shape=vars(SHAPE), goal=GOAL)
    same = all(row["losses agree"] for row in rows)
    everywhere, scattered, whole = (row["speedup"] for row in rows)
    print(
        f"{whole:.2f}x TRL's tokens/s at {arguments.active:g} active rows in whole responses, {scattered:.2f}x where "
        f"they are scattered, {everywhere:.2f}x where all are active; losses {'agree' if same else 'DIFFER'}"
    )
    return 1 if arguments.check and not (same and whole >= GOAL) else 0


def compare(
    state: TrainState,
    trainer: Any,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One row: the same update by both."""
    order = list(range(len(batch.sequences)))
    parts = [trl_inputs(state, batch, order[i : i + MICRO_BATCH]) for i in range(0, len(order), MICRO_BATCH)]
    result = take_turns(
        {
            "ours": lambda: update_policy(state, batch)["loss"],
            "TRL": lambda: trl_update(trainer, optimizer, parts),
        },
        arguments.repeats,
    )
    tokens = sum(len(s.token_ids) for s in batch.sequences)
    (loss, seconds), (trl_loss, trl_seconds) = result["ours"], result["TRL"]
    return {
        "tokens": tokens,
        "s": seconds,
        "TRL s": trl_seconds,
        "tokens/s": tokens / seconds,
        "TRL tokens/s": tokens / trl_seconds,
        "speedup": trl_seconds / seconds,
        "loss": loss,
        "TRL loss": trl_loss,
        "losses agree": abs(loss - trl_loss) < 1e-4,
    }


if __name__ == "__main__":
    sys.exit(main())
