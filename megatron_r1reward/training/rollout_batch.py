"""One rollout batch on its way from text to tensors: packed tokens, log-probs, advantages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_r1reward.algorithm.advantages import normalize_and_filter
from megatron_r1reward.algorithm.policy_loss import Aggregation, aggregation_weights
from megatron_r1reward.algorithm.returns import (
    decoupled_rewards,
    generalized_advantages,
    group_rewards,
    overlong_penalties,
    task_returns,
)
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.balance import ModelCost, spread_over_ranks
from megatron_r1reward.reward.terms import term_values
from megatron_r1reward.training.data_parallel import synchronize_parameters
from megatron_r1reward.training.schedule import LossOutput, run_micro_batches
from megatron_r1reward.training.state import TrainState
from megatron_r1reward.types import PackedBatch, ScoredRollout
from megatron_r1reward.types import Sequence as TokenSequence

Shards = list[list[list[int]]]  # [mini-batch][data-parallel rank]: numbers of rollouts in the global batch


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """This data-parallel rank's N sequences and their R response tokens, back to back on a flat axis cut by
    `cu_response`. `mini_batches` partition the sequences into optimizer steps. Log-probs, values and advantages exist
    on the last pipeline stage."""

    sequences: tuple[TokenSequence, ...]
    mini_batches: tuple[tuple[int, ...], ...]
    rewards: torch.Tensor  # float32 [N], after group baselines; NaN: masked
    cu_response: torch.Tensor  # int64 [N + 1]
    aggregation: Aggregation
    sampler_log_probs: torch.Tensor  # float32 [R]
    old_log_probs: torch.Tensor | None = None  # float32 [R]
    reference_log_probs: torch.Tensor | None = None  # float32 [R]
    entropy: torch.Tensor | None = None  # float32 [R]
    values: torch.Tensor | None = None  # float32 [R], the critic's before its first update on this batch
    value_targets: torch.Tensor | None = None  # float32 [R], what it learns; NaN: masked
    advantages: torch.Tensor | None = None  # float32 [R]
    filtered: torch.Tensor | None = None  # bool [R]
    returns_mean: float = 0.0
    returns_std: float = 0.0

    def rows(self, sequence_indices: Sequence[int]) -> torch.Tensor:
        """Flat response rows of the given sequences, in their order: int64."""
        bounds = self.cu_response.tolist()
        return torch.cat([torch.arange(0), *(torch.arange(bounds[i], bounds[i + 1]) for i in sequence_indices)])


def share_out(state: TrainState, scored: Sequence[ScoredRollout]) -> tuple[Shards, float]:
    """Which rollouts each data-parallel rank trains on, by their cost, and the expected time of the slowest rank over
    the mean. Images are not decoded for it.

    Raises:
        ValueError: a rank would have nothing to do in some optimizer step.
    """
    config, packer, price = state.config, state.packer, ModelCost.of(state.hf_config)
    if config.algorithm.old_log_probs == "sampler":
        _check_versions(scored, state.step)
    costs = []
    for item in scored:
        prompt, response = item.rollout.prompt, len(item.rollout.token_ids)
        patches = sum(packer.image_processor.num_patches(path) for path in prompt.image_paths)
        tokens = len(prompt.token_ids) - len(prompt.image_paths) + patches // packer.image_processor.merge_size**2
        shared = prompt.image_paths if packer.share_images and prompt.image_paths else None
        costs.append(price(tokens=tokens + response, response_tokens=response, patches=patches, images_key=shared))
    return spread_over_ranks(
        costs,
        _expected_idle(config, scored),
        mini_batches=config.rl.mini_batches,
        ranks=state.topology.data_parallel_size,
    )


def _check_versions(scored: Sequence[ScoredRollout], version: int) -> None:
    older = sum(any(span.version != version for span in item.rollout.weight_spans) for item in scored)
    if older:
        raise ValueError(
            f"algorithm.old_log_probs is 'sampler', and {older} of {len(scored)} rollouts of step {version + 1} were "
            "sampled by other weights than those that are trained: set it to 'trainer'"
        )


def _expected_idle(config: RunConfig, scored: Sequence[ScoredRollout]) -> list[bool]:
    """Rollouts that the update will leave out, as far as rewards alone tell: a KL term in the reward and what a critic
    expects are known later."""
    algorithm = config.algorithm
    if every_sequence_counts(config) or algorithm.kl_coefficient > 0 or algorithm.needs_critic:
        return [False] * len(scored)
    lengths = torch.tensor([len(item.rollout.token_ids) for item in scored])
    returns_R = task_returns(
        compared_rewards(config, scored), torch.cat([lengths.new_zeros(1), lengths]).cumsum(0),
        gamma=algorithm.gamma,
    )  # fmt: skip
    useful_R = normalize_and_filter(returns_R, algorithm).advantages != 0
    return [not bool(part.any()) for part in useful_R.split(lengths.tolist())]


def every_sequence_counts(config: RunConfig) -> bool:
    """Whether terms without an advantage (KL, entropy, router losses) reach every token."""
    algorithm, moe = config.algorithm, config.moe
    return (
        not algorithm.skip_idle_sequences
        or algorithm.kl_loss_coefficient != 0
        or algorithm.entropy_coefficient != 0
        or moe.load_balancing != "none"
        or moe.z_loss_coefficient != 0
    )


def compared_rewards(config: RunConfig, scored: Sequence[ScoredRollout]) -> torch.Tensor:
    """Rewards after group baselines: float32 [N]; NaN where masked, which is part of no statistic and no advantage.

    A pair without a label cannot earn what others can. A group is of one pair, so baselines compare like with like.
    Without a baseline the rewards of such pairs are moved by one number, so that both kinds have the same mean over
    their tokens, which is what the normalisation of the batch subtracts; terms on their own are normalised by kind.
    """
    group_N = _groups(config, scored)
    trained_N = torch.tensor([not item.masked for item in scored])
    algorithm = config.algorithm
    rewards_N = torch.tensor([item.reward for item in scored], dtype=torch.float32)
    lengths_N = torch.tensor([len(item.rollout.token_ids) for item in scored])
    penalties_N = overlong_penalties(lengths_N, config.sampling.max_tokens, algorithm.overlong_buffer)
    if algorithm.normalize_terms:
        terms_KN = torch.tensor([term_values(item, config.reward) for item in scored]).float().T
        rewards_N[trained_N] = decoupled_rewards(
            torch.cat([terms_KN, penalties_N[None]])[:, trained_N],
            (*(term.weight for term in config.reward.all_terms), algorithm.overlong_weight),
            group_N[trained_N],
            baseline=algorithm.baseline,
        )
    else:
        rewards_N[trained_N] = group_rewards(
            (rewards_N + algorithm.overlong_weight * penalties_N)[trained_N],
            group_N[trained_N],
            baseline=algorithm.baseline,
            normalize=algorithm.group_normalize,
        )
        if algorithm.baseline == "none":
            _level(rewards_N, (group_N == 1) & trained_N, (group_N == 0) & trained_N, lengths_N)
    rewards_N[~trained_N] = torch.nan
    return rewards_N


def _groups(config: RunConfig, scored: Sequence[ScoredRollout]) -> torch.Tensor:
    """What each rollout is compared with: int64 [N], equal in a group. Without a baseline the batch is one, or two: 1
    are the pairs without a label."""
    if config.algorithm.baseline == "none":
        return torch.tensor([int(item.rollout.prompt.label is None) for item in scored])
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(item.rollout.prompt.group_id, len(numbers)) for item in scored])


def _level(rewards_N: torch.Tensor, moved_N: torch.Tensor, others_N: torch.Tensor, lengths_N: torch.Tensor) -> None:
    """Move the rewards at `moved_N` so that their mean over tokens is that of `others_N`; in place."""
    if not (moved_N.any() and others_N.any()):
        return
    means = [(rewards_N.double() * lengths_N)[part_N].sum() / lengths_N[part_N].sum() for part_N in (moved_N, others_N)]
    rewards_N[moved_N] += (means[1] - means[0]).to(rewards_N.dtype)


def pack(state: TrainState, scored: Sequence[ScoredRollout], shards: Shards) -> RolloutBatch:
    """This rank's share of the scored rollouts; `shards` of `share_out`."""
    config = state.config
    mini_batches = [ranks[state.topology.data_parallel_rank] for ranks in shards]
    indices = [index for mini_batch in mini_batches for index in mini_batch]
    mine = [scored[index].rollout for index in indices]
    sequences = tuple(state.packer.sequence(rollout.prompt, rollout.token_ids) for rollout in mine)
    cu_response = torch.tensor([0, *(sequence.response_length for sequence in sequences)]).cumsum(0)
    starts = itertools.accumulate(map(len, mini_batches), initial=0)
    masked_N = torch.tensor([scored[index].masked for index in indices])
    return RolloutBatch(
        sequences=sequences,
        mini_batches=tuple(tuple(range(a, b)) for a, b in itertools.pairwise(starts)),
        rewards=compared_rewards(config, scored)[indices],
        cu_response=cu_response,
        aggregation=_without(masked_N, aggregation_weights(cu_response, config.algorithm), cu_response),
        sampler_log_probs=torch.tensor([lp for rollout in mine for lp in rollout.log_probs], dtype=torch.float32),
    )


def _without(masked_N: torch.Tensor, aggregation: Aggregation, cu_response: torch.Tensor) -> Aggregation:
    """No term of a masked response's tokens counts, KL and entropy included; it stays in the denominator."""
    masked_R = masked_N.repeat_interleave(cu_response.diff())
    return replace(aggregation, weights=aggregation.weights.masked_fill(masked_R, 0.0))


def _collect(output_2R: torch.Tensor, batch: PackedBatch) -> LossOutput:
    values = {"output": output_2R.detach().cpu(), "indices": batch.sequence_indices}
    return output_2R.sum(), torch.tensor(1, dtype=torch.int, device=output_2R.device), values


def forward_log_probs(state: TrainState, batch: RolloutBatch, model: torch.nn.Module) -> torch.Tensor:
    """Log-probs and entropies of all response tokens under `model`: float32 [2, R]; empty before the last stage."""
    return _forward(state, batch, model, torch.empty(2, int(batch.cu_response[-1])))


def _forward(state: TrainState, batch: RolloutBatch, model: torch.nn.Module, output_KR: torch.Tensor) -> torch.Tensor:
    """`output_KR` filled with what `model` says of every response token."""
    model.eval()
    micro_batches = state.packer.plan(batch.sequences, range(len(batch.sequences)))
    parts = run_micro_batches(state, batch.sequences, micro_batches, _collect, forward_only=True, model=model)
    for part in parts:
        output_KR[:, batch.rows(part["indices"])] = part["output"]
    return output_KR


def add_log_probs(state: TrainState, batch: RolloutBatch) -> RolloutBatch:
    """Old log-probs (the trainer's own before the first update on this batch, or the sampler's where these are the
    same) and the reference's, if there is one."""
    if state.config.algorithm.old_log_probs == "sampler":
        batch = replace(batch, old_log_probs=batch.sampler_log_probs)
    else:
        old_2R = forward_log_probs(state, batch, state.model)
        batch = replace(batch, old_log_probs=old_2R[0], entropy=old_2R[1])
    if state.reference is None:
        return batch
    return replace(batch, reference_log_probs=forward_log_probs(state, batch, state.reference)[0])


def add_values(state: TrainState, batch: RolloutBatch) -> RolloutBatch:
    """What the critic, where there is one, expects at every response token, before its first update on this batch."""
    critic = state.critic
    if critic is None:
        return batch
    synchronize_parameters(critic.model)  # no push has finished the gathers that overlap
    return replace(batch, values=_forward(critic, batch, critic.model, torch.empty(1, int(batch.cu_response[-1])))[0])


def add_advantages(state: TrainState, batch: RolloutBatch) -> RolloutBatch:
    """Returns, or with a critic its advantages and targets; global normalization and filter."""
    if not state.topology.is_last_stage:
        return batch
    algorithm = state.config.algorithm
    kl_tokens_R, targets_R = None, None
    if algorithm.kl_coefficient > 0:
        assert batch.old_log_probs is not None and batch.reference_log_probs is not None
        kl_tokens_R = batch.old_log_probs - batch.reference_log_probs
    earned: dict[str, Any] = {
        "kl_tokens_R": kl_tokens_R, "kl_coefficient": algorithm.kl_coefficient, "gamma": algorithm.gamma
    }  # fmt: skip
    if batch.values is None:
        returns_R = task_returns(batch.rewards, batch.cu_response, **earned)
    else:
        returns_R, targets_R = generalized_advantages(
            batch.rewards, batch.cu_response, batch.values, gae_lambda=algorithm.gae_lambda, **earned
        )
    # On the device: its groups take no tensors of the host.
    returns_R = returns_R.to(state.topology.device)
    result = normalize_and_filter(returns_R, algorithm, group=_data_parallel_group(state))
    return replace(
        batch,
        value_targets=targets_R,
        advantages=result.advantages.cpu(),
        filtered=result.filtered_mask.cpu(),
        returns_mean=result.mean,
        returns_std=result.std,
    )


def _data_parallel_group(state: TrainState) -> dist.ProcessGroup | None:
    return parallel_state.get_data_parallel_group() if state.topology.data_parallel_size > 1 else None
