"""Stage 1: long chain-of-thought cold start. Loss on the response only, packed sequences."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import torch

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.loader import StagedSampler
from megatron_r1reward.data.preference_row import SftExample
from megatron_r1reward.data.prompt import render_chat
from megatron_r1reward.data.stage_data import read_training_examples
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training.loop import set_threads
from megatron_r1reward.training.schedule import LossOutput, reduce_statistics, train_micro_batches
from megatron_r1reward.training.state import TrainState
from megatron_r1reward.training.supervised import (
    SupervisedStage,
    check_batch,
    run_supervised,
    select_together,
)
from megatron_r1reward.training.trained_policy import sft_policy
from megatron_r1reward.types import PackedBatch, Prompt, Sequence

log = logging.getLogger(__name__)


def cross_entropy(output_2R: torch.Tensor, batch: PackedBatch) -> LossOutput:
    """Negative log-likelihood summed over response tokens; the denominator is their global number."""
    loss = -output_2R[0].sum()
    tokens = torch.tensor(batch.targets.numel(), dtype=torch.int, device=loss.device)
    statistics = {
        "loss": float(loss.detach()),
        "entropy": float(output_2R[1].detach().sum()),
        "tokens": batch.targets.numel(),
        "all_tokens": batch.num_tokens,
    }
    return loss, tokens, statistics


def to_sequence(state: TrainState, example: SftExample) -> Sequence:
    """Prompt tokens, the response, and the end-of-turn token."""
    prompt = Prompt(
        id=example.id,
        preference_id=example.id,
        token_ids=render_chat(state.tokenizer, example.messages),
        image_paths=example.image_paths,
        label=1,
        swapped=False,
    )
    response = state.tokenizer.encode(example.response, add_special_tokens=False)
    return state.packer.sequence(prompt, [*response, state.tokenizer.eos_token_id])


def train_step(state: TrainState, sampler: StagedSampler, examples: tuple[SftExample, ...]) -> dict[str, float]:
    """One optimizer step on the batch that belongs to `state.step`."""
    started = time.monotonic()
    topology, section = state.topology, state.config.sft
    draws = sampler.batch(state.step, section.global_batch_size)
    mine = draws[topology.data_parallel_rank :: topology.data_parallel_size]
    sequences = [to_sequence(state, examples[draw.index]) for draw in mine]
    micro_batches = state.packer.plan(sequences, range(len(sequences)))
    statistics, outcome = train_micro_batches(state, sequences, micro_batches, cross_entropy)
    total = reduce_statistics(state, statistics)
    state.step += 1
    if outcome.skipped:
        log.warning("step %d: gradient norm is %s; the update was skipped", state.step, outcome.grad_norm)
    return {
        "sft/loss": total["loss"] / total["tokens"],
        "entropy": total["entropy"] / total["tokens"],
        "grad_norm": outcome.grad_norm,
        "update/skipped": float(outcome.skipped),
        "lr": outcome.lr,
        "tokens_per_second": total["all_tokens"] / (time.monotonic() - started),
    }


def run(config: RunConfig, topology: Topology) -> Path | None:
    """Run the stage to its end and return the exported Hugging Face folder; None when it was asked to save and stop.

    Raises:
        ValueError: the configuration or the data cannot be used.
    """
    set_threads(config)
    check_batch(config.sft, "sft", topology)
    data = read_training_examples(config)
    selected = select_together(data.examples, data.set_aside, config, config.sft, topology)
    stage = SupervisedStage(
        name="sft",
        title="SFT",
        section=config.sft,
        selected=selected,
        step=partial(train_step, examples=selected.rows),
        headline={"loss": "sft/loss"},
        described=lambda steps: sft_policy(config, selected.rows, steps=steps),
    )
    return run_supervised(config, topology, stage)
