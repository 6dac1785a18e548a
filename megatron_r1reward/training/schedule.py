"""Micro-batches through megatron-core's schedule: forward only, or forward, backward and optimizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r1reward.kernels.linear_policy_loss import PolicyLossOutput
from megatron_r1reward.models.base import chunks_of
from megatron_r1reward.models.head import LossRequest
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training.data_parallel import zero_gradients
from megatron_r1reward.training.state import TrainState
from megatron_r1reward.types import PackedBatch
from megatron_r1reward.types import Sequence as TokenSequence

# What a loss returns for one micro-batch: the SUM of weighted token losses, its share of the global denominator, and
# statistics. The division by the global denominator happens once, in megatron-core, after all ranks have added up.
LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]
Loss = Callable[[Any, PackedBatch], LossOutput]  # its first argument is what the model's last chunk returned
LossRequestFn = Callable[[PackedBatch], LossRequest]


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
    request: LossRequestFn | None = None,
    together: int = 1,
) -> list[dict[str, Any]]:
    """Run every micro-batch through `model` (the policy by default); returns the statistics of each, nothing on all but
    the last pipeline stage. With `request` the LM head forms the loss, and `loss` gets a PolicyLossOutput. A
    micro-batch that has to be cut is cut between groups of `together` sequences."""
    chunks = chunks_of(model or state.model)
    topology = state.topology
    multiple = topology.pipeline_parallel_size if len(chunks) > 1 else 1
    micro_batches = complete(micro_batches, multiple, _common_number(state, len(micro_batches)), together)

    def forward_step(iterator: Iterator[PackedBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        output = chunk(batch) if request is None else chunk(batch, request(batch))
        return output, lambda result: _counted_once(loss, result, batch, topology)

    batches = (state.packer.pack(sequences, indices) for indices in micro_batches)
    iterators = list(itertools.tee(batches, len(chunks)))
    with torch.set_grad_enabled(not forward_only):
        statistics = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=state.config.data.token_budget,
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return [part for part in statistics if part]


def _common_number(state: TrainState, number: int) -> int:
    """The largest number of micro-batches on any data-parallel rank, where ranks share experts: every forward pass
    exchanges tokens between them, so a rank that stopped earlier would leave the others waiting."""
    if state.config.parallel.expert_model_parallel_size == 1 or state.topology.data_parallel_size == 1:
        return 1
    largest = torch.tensor(number, device=state.topology.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return int(largest)


def complete(
    micro_batches: Sequence[Sequence[int]], multiple: int, at_least: int = 1, together: int = 1
) -> list[list[int]]:
    """The micro-batches cut further, so that their number is a multiple of `multiple` and not below `at_least`.

    The interleaved schedule needs a multiple of the pipeline stages, experts shared by several ranks need the same
    number on all of them. The largest are halved, between groups of `together` sequences; where there are not enough,
    empty ones fill up.
    """
    parts = [list(indices) for indices in micro_batches]
    wanted = max(len(parts), at_least)
    wanted += -wanted % multiple
    while len(parts) < wanted:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]), default=None)
        if largest is None or len(parts[largest]) < 2 * together:
            parts.append([])
        else:
            whole = parts[largest]
            half = len(whole) // together // 2 * together
            parts[largest : largest + 1] = [whole[:half], whole[half:]]
    return parts


def _counted_once(loss: Loss, output: Any, batch: PackedBatch, topology: Topology) -> LossOutput:
    """Context-parallel ranks compute the same loss over all rows and back-propagate into their own: its denominator
    counts on one of them. A micro-batch without sequences adds nothing."""
    if not batch.sequence_indices:
        anchor = output.total if isinstance(output, PolicyLossOutput) else output.sum()
        return anchor, torch.zeros((), dtype=torch.int, device=anchor.device), {}
    total, count, statistics = loss(output, batch)
    if topology.context_parallel_rank != 0:
        count = torch.zeros_like(count)
    return total, count, statistics


def train_micro_batches(
    state: TrainState,
    sequences: Sequence[TokenSequence],
    micro_batches: Sequence[Sequence[int]],
    loss: Loss,
    *,
    request: LossRequestFn | None = None,
    together: int = 1,
) -> tuple[list[dict[str, Any]], StepOutcome]:
    """One optimizer step over the given micro-batches of this data-parallel rank; `request` and `together` as for
    `run_micro_batches`."""
    state.model.train()
    zero_gradients(state.model)
    state.optimizer.zero_grad()
    statistics = run_micro_batches(
        state, sequences, micro_batches, loss, forward_only=False, request=request, together=together
    )
    return statistics, optimizer_step(state)


def optimizer_step(state: TrainState) -> StepOutcome:
    """Norm, clip and update from the finished gradients. A norm that is not finite skips the update on all ranks.

    Raises:
        FloatingPointError: `optimizer.max_skipped_steps` in a row were skipped.
    """
    section = state.config.optimizer
    lr = float(state.optimizer.param_groups[0]["lr"])
    found_inf = state.optimizer.prepare_grads()
    grad_norm = float(state.optimizer.get_grad_norm())
    # The norm is all-reduced, so every rank comes to the same decision.
    skipped = bool(found_inf) or not math.isfinite(grad_norm)
    if not skipped:
        if section.clip_grad > 0:
            _clip(state.optimizer, section.clip_grad, grad_norm)
        state.optimizer.step_with_ready_grads()
    state.scheduler.step(increment=1)
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    if state.skipped_in_a_row >= section.max_skipped_steps:
        raise FloatingPointError(
            f"{state.skipped_in_a_row} optimizer steps in a row had a gradient norm of {grad_norm}: the run cannot "
            "recover. Resume from the last checkpoint with a lower optimizer.lr, or look for broken data"
        )
    return StepOutcome(grad_norm=grad_norm, skipped=skipped, lr=lr)


def _clip(optimizer: Any, max_norm: float, grad_norm: float) -> None:
    """Scale all gradients by one factor. Experts have an optimizer of their own: the norm is that of all parameters."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=grad_norm)


def reduce_statistics(state: TrainState, statistics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Combine per-micro-batch statistics of all data-parallel ranks, on every rank.

    Names starting with "max_" take the maximum, all others add up.
    """
    local = _combine(statistics)
    topology = state.topology
    if topology.world_size == 1:
        return local
    gathered: list[dict[str, float] | None] = [None] * topology.world_size
    dist.all_gather_object(gathered, local if topology.reports else None)
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
