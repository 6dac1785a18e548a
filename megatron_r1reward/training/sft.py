"""Stage 1: long chain-of-thought cold start. Loss on the response only, packed sequences."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.loader import EpochSampler
from megatron_r1reward.data.preference_row import SftExample
from megatron_r1reward.data.prompt import render_chat
from megatron_r1reward.data.stage_data import read_training_examples
from megatron_r1reward.monitor.sinks import build_monitor
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training import resume
from megatron_r1reward.training.heartbeat import RunControl
from megatron_r1reward.training.loop import Stage, finish, run_to_end
from megatron_r1reward.training.models_read import models_read, parts_read
from megatron_r1reward.training.schedule import LossOutput, reduce_statistics, train_micro_batches
from megatron_r1reward.training.state import TrainState, build_state
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


def train_step(state: TrainState, examples: tuple[SftExample, ...], sampler: EpochSampler) -> dict[str, float]:
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
    if config.run.num_threads:
        torch.set_num_threads(config.run.num_threads)
    if config.sft.global_batch_size < topology.data_parallel_size:
        raise ValueError(
            f"sft.global_batch_size {config.sft.global_batch_size} is smaller than the {topology.data_parallel_size} "
            "data-parallel ranks: every rank needs a sequence"
        )
    output = config.run.output_dir
    examples = read_training_examples(config).examples
    draws = None if config.sft.steps else config.sft.epochs * len(examples)
    steps = config.sft.steps or math.ceil(config.sft.epochs * len(examples) / config.sft.global_batch_size)
    control = RunControl(output, topology, total_steps=steps)
    control.loading()
    state = build_state(config, topology, optimizer_steps=steps)
    state.data = resume.describe_data(
        resume.row_contents(examples, topology), seed=config.run.seed, batch_size=config.sft.global_batch_size
    )
    state.models = models_read(config, topology, rl=False)
    state.parts = {kind: part.described() for kind, part in parts_read(config).items()}
    state.described = sft_policy(config, examples, steps=steps)
    resumed = resume.resume(state)
    resume.prepare(state)
    sampler = EpochSampler(len(examples), seed=config.run.seed, draws=draws, at_least=topology.data_parallel_size)
    monitor = (
        build_monitor(config.monitor, output, "sft", resumed_step=state.step if resumed else None)
        if topology.is_main
        else None
    )
    stage = Stage(
        title="SFT",
        steps=steps,
        step=lambda timer: train_step(state, examples, sampler),
        headline={"loss": "sft/loss"},
        monitor=monitor,
    )
    control.begin(state.step, resumed=resumed)
    folder = finish(state, control, finished=run_to_end(state, stage, control))
    if monitor is not None:
        monitor.close()
    return folder
