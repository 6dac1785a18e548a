"""The critic of PPO: a second model, whose scalar head is read at every response token. V_t is what it expects a
response to earn from token t on, before that token is known: the value at the row that predicts it.

It is a training state of its own beside the policy's (`TrainState.critic`): other weights and moments, the same layout,
sequences and mini-batches. Checkpoints hold both; rollout servers never see it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import fmean

import torch

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.training.policy_update import counted, no_loss, optimizer_steps
from megatron_r1reward.training.rollout_batch import RolloutBatch
from megatron_r1reward.training.schedule import Loss, LossOutput, reduce_statistics
from megatron_r1reward.training.state import TrainState, build_state, scalar_head_layers
from megatron_r1reward.types import PackedBatch


def add_critic(state: TrainState) -> None:
    """Build the critic of `state`, as `[critic]` says.

    Raises:
        ValueError: its folder cannot be used, or reads texts or images otherwise than the policy.
    """
    config = state.config
    own = _config(config)
    layers = scalar_head_layers(own.model.path, config.critic.score_layers, key="critic.score_layers")
    updates = config.rl.steps * config.rl.optimizer_steps
    critic = build_state(own, state.topology, optimizer_steps=updates, score_layers=layers)
    _check_alike(state, critic)
    critic.packer = replace(critic.packer, last_token_only=False)
    critic.saver = state.saver  # one checkpoint holds both
    state.critic = critic


def _config(config: RunConfig) -> RunConfig:
    """What the critic is built by: the policy's, with weights and a learning rate of its own.

    Raises:
        ValueError: nothing says where its first weights are.
    """
    section = config.critic
    if section.path is None and config.checkpoint.init_from is not None:
        raise ValueError(
            f"the policy begins with checkpoint.init_from {config.checkpoint.init_from}, which holds no critic: set "
            "critic.path to the Hugging Face folder that it begins with"
        )
    changed = {
        "model": config.model.model_copy(update={"path": section.path or config.model.path, "freeze_language": False}),
        "optimizer": config.optimizer.model_copy(update={"lr": section.lr or config.optimizer.lr}),
        "checkpoint": config.checkpoint.model_copy(update={"init_from": None}),
    }
    return config.model_copy(update=changed)


def _check_alike(policy: TrainState, critic: TrainState) -> None:
    """ValueError unless both read the same token ids as the same texts, and cut images into as many tokens."""
    theirs, ours = critic.packer.image_processor, policy.packer.image_processor
    reasons = {
        "tokenizer": critic.tokenizer.get_vocab() == policy.tokenizer.get_vocab(),
        "image token": critic.packer.image_token_id == policy.packer.image_token_id,
        "patch size": (theirs.processor.patch_size, theirs.merge_size) == (ours.processor.patch_size, ours.merge_size),
    }
    if other := [name for name, same in reasons.items() if not same]:
        raise ValueError(
            f"critic.path {critic.config.model.path} has another {' and another '.join(other)} than model.path "
            f"{policy.config.model.path}, whose tokens it would value: begin with a model that has the same"
        )


def value_loss(
    values_R: torch.Tensor, old_values_R: torch.Tensor, targets_R: torch.Tensor, *, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each response token, [R], and whether the clip decides, bool [R]: then the token has no gradient.

        0.5 max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2)        `clip` 0: 0.5 (V - G)^2

    The clip is that of the PPO implementations ("value function clipping" in arXiv 2005.12729 sec. 3), not of the
    publication (arXiv 1707.06347 eq. 9).
    """
    plain_R = (values_R - targets_R).square()
    if clip == 0.0:
        return 0.5 * plain_R, torch.zeros_like(plain_R, dtype=torch.bool)
    bounded_R = (values_R.clamp(old_values_R - clip, old_values_R + clip) - targets_R).square()
    return 0.5 * torch.maximum(plain_R, bounded_R), bounded_R > plain_R


def update_critic(state: TrainState, rollouts: RolloutBatch) -> dict[str, float]:
    """The critic's optimizer steps on the policy's mini-batches, also on sequences without an advantage; metrics, the
    same on every rank. Nothing where there is no critic."""
    critic = state.critic
    if critic is None:
        return {}
    totals, outcomes = optimizer_steps(critic, rollouts, _loss(critic, rollouts))
    total = Counter(reduce_statistics(critic, [*totals, _before_the_update(critic, rollouts)]))
    tokens = total["valued"]
    mean, unexplained_mean = total["targets"] / tokens, total["unexplained"] / tokens
    spread = total["targets_squared"] / tokens - mean**2
    unexplained = total["unexplained_squared"] / tokens - unexplained_mean**2
    return {
        "critic/loss": total["loss"] / total["count"],
        "critic/explained_variance": 1.0 - unexplained / spread if spread > 0 else 0.0,
        "critic/value_mean": total["values"] / tokens,
        "critic/clipped_fraction": total["clipped"] / total["tokens"],
        "critic/grad_norm": fmean(outcome.grad_norm for outcome in outcomes),
        "critic/lr": outcomes[-1].lr,
        "critic/skipped": sum(outcome.skipped for outcome in outcomes),
    }


def _loss(critic: TrainState, rollouts: RolloutBatch) -> Loss:
    if not critic.topology.is_last_stage:
        return no_loss
    clip = critic.config.critic.value_clip
    old_R, targets_R, trains_R = _learned(rollouts)
    targets_R = torch.where(trains_R, targets_R, old_R)
    weights_R = torch.where(trains_R, rollouts.aggregation.weights, 0.0)

    def loss(values_1R: torch.Tensor, batch: PackedBatch) -> LossOutput:
        rows, device = rollouts.rows(batch.sequence_indices), values_1R.device
        per_token_R, clipped_R = value_loss(values_1R[0], old_R[rows].to(device), targets_R[rows].to(device), clip=clip)
        total = (weights_R[rows].to(device) * per_token_R).sum()
        found = torch.stack([total.detach().double(), clipped_R.sum(dtype=torch.float64)])
        statistics = dict(zip(("loss", "clipped"), found.tolist(), strict=True))  # the device is waited for once
        return total, *counted(rollouts, batch, statistics)

    return loss


def _learned(rollouts: RolloutBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values before the update, targets, and which tokens are learned from, [R] each: those of masked responses are
    not."""
    assert rollouts.values is not None and rollouts.value_targets is not None
    trains_R = rollouts.value_targets.isfinite() & (rollouts.aggregation.weights != 0)
    return rollouts.values, rollouts.value_targets, trains_R


def _before_the_update(critic: TrainState, rollouts: RolloutBatch) -> dict[str, float]:
    """Sums over this rank's tokens, in float64: what was expected, what came, and the difference."""
    if not critic.topology.is_last_stage:
        return {}
    values_R, targets_R, trains_R = _learned(rollouts)
    values_R, targets_R = values_R[trains_R].double(), targets_R[trains_R].double()
    unexplained_R = targets_R - values_R
    return {
        "valued": values_R.numel(),
        "values": float(values_R.sum()),
        "targets": float(targets_R.sum()),
        "targets_squared": float(targets_R.square().sum()),
        "unexplained": float(unexplained_R.sum()),
        "unexplained_squared": float(unexplained_R.square().sum()),
    }
