"""The scalar reward model: a Bradley-Terry head on the same backbone, trained on the same pairs.

A row makes two sequences, the question with the better response and with the other one, which share a micro-batch. The
reward of a response is the value of the scalar head at the end of its turn.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.loader import StagedSampler, seeded_sample
from megatron_r1reward.data.stage_data import read_heldout, read_training_preferences, scored_examples
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training.data_parallel import synchronize_parameters
from megatron_r1reward.training.loop import set_threads
from megatron_r1reward.training.schedule import LossOutput, reduce_statistics, run_micro_batches, train_micro_batches
from megatron_r1reward.training.sft import to_sequence
from megatron_r1reward.training.state import TrainState, scalar_head_layers
from megatron_r1reward.training.supervised import (
    SupervisedStage,
    check_batch,
    run_supervised,
    select_together,
)
from megatron_r1reward.training.trained_policy import rm_policy
from megatron_r1reward.types import PackedBatch, Preference
from megatron_r1reward.types import Sequence as TokenSequence

log = logging.getLogger(__name__)


def bradley_terry(values_1S: torch.Tensor, batch: PackedBatch, *, margin: float) -> LossOutput:
    """-log sigmoid(r_chosen - r_rejected - margin), in float32, of pairs that stand next to each other.

    The loss is divided by the global number of sequences, as the router's losses are, so that a pair counts twice in
    the sum: the result is the mean over pairs.
    """
    rewards_P2 = values_1S[0].view(-1, 2)
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    losses_P = -F.logsigmoid(margins_P - margin)
    with torch.no_grad():
        right_P = (margins_P > 0).float() + 0.5 * (margins_P == 0).float()
        sums = [losses_P, right_P, margins_P, rewards_P2, rewards_P2.double().square()]
        found = torch.stack([one.sum(dtype=torch.float64) for one in sums]).tolist()  # the device is waited for once
    names = ("loss", "right", "margins", "rewards", "squares")
    pairs = rewards_P2.shape[0]
    statistics = dict(zip(names, found, strict=True)) | {"pairs": pairs, "all_tokens": batch.num_tokens}
    return 2 * losses_P.sum(), torch.tensor(2 * pairs, dtype=torch.int, device=losses_P.device), statistics


def to_sequences(state: TrainState, pairs: Sequence[Preference]) -> list[TokenSequence]:
    """Sequence 2n is the better response of pair n, 2n + 1 the other one."""
    return [to_sequence(state, one) for pair in pairs for one in scored_examples(pair)]


def train_step(state: TrainState, sampler: StagedSampler, pairs: Sequence[Preference]) -> dict[str, float]:
    """One optimizer step on the pairs that belong to `state.step`."""
    started = time.monotonic()
    topology, section = state.topology, state.config.reward_model
    draws = sampler.batch(state.step, section.global_batch_size)
    mine = [pairs[draw.index] for draw in draws[topology.data_parallel_rank :: topology.data_parallel_size]]
    sequences = to_sequences(state, mine)
    loss = partial(bradley_terry, margin=section.margin)
    plan = state.packer.plan_pairs(sequences)
    statistics, outcome = train_micro_batches(state, sequences, plan, loss, together=2)
    total = reduce_statistics(state, statistics)
    state.step += 1
    if outcome.skipped:
        log.warning("step %d: gradient norm is %s; the update was skipped", state.step, outcome.grad_norm)
    count = total["pairs"]
    mean = total["rewards"] / (2 * count)
    return {
        "rm/loss": total["loss"] / count,
        "rm/accuracy": total["right"] / count,
        "rm/margin": total["margins"] / count,
        "rm/reward_mean": mean,
        "rm/reward_std": math.sqrt(max(total["squares"] / (2 * count) - mean**2, 0.0)),
        "grad_norm": outcome.grad_norm,
        "update/skipped": float(outcome.skipped),
        "lr": outcome.lr,
        "tokens_per_second": total["all_tokens"] / (time.monotonic() - started),
    }


def score_sequences(state: TrainState, sequences: Sequence[TokenSequence]) -> list[float]:
    """The reward of each sequence, by the current weights, on every rank; collective."""
    topology = state.topology
    mine = range(topology.data_parallel_rank, len(sequences), topology.data_parallel_size)

    def collect(values_1S: torch.Tensor, batch: PackedBatch) -> LossOutput:
        rewards = dict(zip(batch.sequence_indices, values_1S[0].tolist(), strict=True))
        return values_1S.sum(), torch.tensor(1, dtype=torch.int, device=values_1S.device), {"rewards": rewards}

    state.model.eval()
    synchronize_parameters(state.model)
    parts = run_micro_batches(state, sequences, state.packer.plan(sequences, mine), collect, forward_only=True)
    local = {index: reward for part in parts for index, reward in part["rewards"].items()}
    everyone: list[dict[int, float]] = [local]
    if topology.world_size > 1:
        everyone = [{}] * topology.world_size
        dist.all_gather_object(everyone, local)
    rewards = {index: reward for found in everyone for index, reward in found.items()}
    return [rewards[index] for index in range(len(sequences))]


def pairwise_accuracy(state: TrainState, pairs: Sequence[Preference]) -> float:
    """Share of pairs whose better response has the higher reward; equal rewards count half. Collective."""
    rewards = score_sequences(state, to_sequences(state, pairs))
    found = list(zip(rewards[::2], rewards[1::2], strict=True))
    return sum((better > other) + 0.5 * (better == other) for better, other in found) / len(found)


def head_layers(config: RunConfig) -> int:
    """`scalar_head_layers` of this stage."""
    new_head, wanted = config.checkpoint.init_from is None, config.reward_model.score_layers
    return scalar_head_layers(config.model.path, wanted, key="reward_model.score_layers", new_head=new_head)


def run(config: RunConfig, topology: Topology) -> Path | None:
    """Run the stage to its end and return the exported Hugging Face folder; None when it was asked to save and stop.

    Raises:
        ValueError: the configuration or the data cannot be used.
    """
    set_threads(config)
    section = config.reward_model
    check_batch(section, "reward_model", topology)
    layers = head_layers(config)
    data = read_training_preferences(config, "rm")
    selected = select_together(data.preferences, data.set_aside, config, section, topology)
    pairs = selected.rows
    probe = None
    if section.heldout_every is not None:
        heldout = seeded_sample(
            read_heldout(config, scalar=True).preferences, section.heldout_pairs, seed=config.run.seed
        )
        probe = partial(pairwise_accuracy, pairs=heldout)
    stage = SupervisedStage(
        name="rm",
        title="reward model",
        section=section,
        selected=selected,
        step=partial(train_step, pairs=pairs),
        headline={"loss": "rm/loss", "accuracy": "rm/accuracy"},
        described=lambda steps: rm_policy(config, rows=len(pairs), steps=steps),
        score_layers=layers,
        probe=probe,
        probe_every=section.heldout_every,
    )
    return run_supervised(config, topology, stage)
