"""Micro-batches through megatron-core's schedule: forward only, or forward, backward and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r1reward.training.state import TrainState
from megatron_r1reward.types import PackedBatch
from megatron_r1reward.types import Sequence as TokenSequence

# What a loss returns for one micro-batch: the SUM of weighted token losses, its share of the global denominator, and
# statistics. The division by the global denominator happens once, in megatron-core, after all ranks have added up.
LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]
Loss = Callable[[torch.Tensor, PackedBatch], LossOutput]


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """`grad_norm` is global and unclipped. A step with a non-finite norm changes nothing, on all ranks alike."""

    grad_norm: float
    skipped: bool
    lr: float


def run_micro_batches(
    state: TrainState,
    sequences: Sequence[TokenSequence],
    micro_batches: Sequence[Sequence[int]],
    loss: Loss,
    *,
    forward_only: bool,
    model: torch.nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Run every micro-batch through `model` (the policy by default); returns the statistics of each, nothing on all but
    the last pipeline stage."""
    assert micro_batches, "a rank needs at least one sequence per step"

    def forward_step(iterator: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        return model(batch), lambda output: loss(output, batch)

    batches = (state.packer.pack(sequences, indices) for indices in micro_batches)
    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=model or state.model,
            num_microbatches=len(micro_batches),
            seq_length=state.config.data.token_budget,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def train_micro_batches(
    state: TrainState, sequences: Sequence[TokenSequence], micro_batches: Sequence[Sequence[int]], loss: Loss
) -> tuple[list[dict[str, Any]], StepOutcome]:
    """One optimizer step over the given micro-batches of this data-parallel rank."""
    state.model.train()
    state.model.zero_grad_buffer()
    state.optimizer.zero_grad()
    statistics = run_micro_batches(state, sequences, micro_batches, loss, forward_only=False)
    return statistics, _optimizer_step(state)


def _optimizer_step(state: TrainState) -> StepOutcome:
    lr = float(state.optimizer.param_groups[0]["lr"])
    found_inf = state.optimizer.prepare_grads()
    grad_norm = float(state.optimizer.get_grad_norm())
    # The norm is all-reduced, so every rank comes to the same decision.
    skipped = bool(found_inf) or not torch.isfinite(torch.tensor(grad_norm))
    if not skipped:
        if state.config.optimizer.clip_grad > 0:
            state.optimizer.clip_grad_norm(state.config.optimizer.clip_grad)
        state.optimizer.step_with_ready_grads()
    state.scheduler.step(increment=1)
    return StepOutcome(grad_norm=grad_norm, skipped=skipped, lr=lr)


def reduce_statistics(state: TrainState, statistics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Combine per-micro-batch statistics of all data-parallel ranks, on every rank.

    Names starting with "max_" take the maximum, all others add up.
    """
    local = _combine(statistics)
    topology = state.topology
    if topology.world_size == 1:
        return local
    contributes = topology.is_last_stage and topology.tensor_parallel_rank == 0
    gathered: list[dict[str, float] | None] = [None] * topology.world_size
    dist.all_gather_object(gathered, local if contributes else None)
    return _combine([part for part in gathered if part is not None])


def _combine(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    combined: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if name.startswith("max_"):
                combined[name] = max(combined.get(name, float("-inf")), float(value))
            else:
                combined[name] = combined.get(name, 0.0) + float(value)
    return combined
