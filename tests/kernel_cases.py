"""Inputs for the fused policy loss, and what float64 autograd through the plain torch truth makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_r1reward.algorithm.policy_loss import policy_loss, truncated_importance_weights
from megatron_r1reward.config.schema import AlgorithmSection
from megatron_r1reward.kernels.choose_kernel import row_kernels
from megatron_r1reward.kernels.linear_policy_loss import loss_and_gradient_
from megatron_r1reward.kernels.lm_head import Head, HeadOptions
from megatron_r1reward.kernels.policy_loss.row_kernels import (
    LogitRows,
    PolicyLossOptions,
    TokenInputs,
    VocabularyShard,
)

OPTIONS = {
    "paper": PolicyLossOptions(),
    "temperature": PolicyLossOptions(),
    "k1": PolicyLossOptions(kl_coefficient=0.1, kl_estimator="k1"),
    "k2": PolicyLossOptions(kl_coefficient=0.1, kl_estimator="k2"),
    "k3": PolicyLossOptions(kl_coefficient=0.1, kl_estimator="k3"),
    "k3 bound": PolicyLossOptions(kl_coefficient=0.1, kl_estimator="k3", kl_bound=0.02),
    "entropy": PolicyLossOptions(entropy_coefficient=0.05),
    "dual_clip": PolicyLossOptions(dual_clip=3.0),
    "importance": PolicyLossOptions(importance_cap=2.0),
    "tight_preclip": PolicyLossOptions(preclip_min=0.95, preclip_max=1.05),
    "asymmetric": PolicyLossOptions(clip_low=0.1, clip_high=0.28),
    "everything": PolicyLossOptions(
        kl_coefficient=0.04, kl_bound=10.0, entropy_coefficient=0.01, importance_cap=2.0, dual_clip=3.0
    ),
}
TEMPERATURES = {"temperature": 0.7, "entropy": 1.3, "everything": 0.9}  # of the options' matrix; else 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything the loss returns, and the gradient of its sum by the logits."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    loss: torch.Tensor
    flags: torch.Tensor
    gradient: torch.Tensor


def make_case(
    rows: int, vocabulary: int, *, temperature: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, TokenInputs]:
    """Logits, and inputs whose log-ratios, advantages and importance weights reach every branch; 5th rows masked."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=generator) * 3).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    scaled = logits.double() / temperature
    log_probs = scaled.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    old = (log_probs - torch.linspace(-2.0, 2.5, rows)).float()
    weights = torch.rand(rows, generator=generator) + 0.1
    weights[::5] = 0.0
    return logits, TokenInputs(
        targets=targets,
        old_log_probs=old,
        advantages=torch.randn(rows, generator=generator) * 2.5,
        weights=weights,
        reference_log_probs=(log_probs + 0.3 * torch.randn(rows, generator=generator)).float(),
        sampler_log_probs=old + torch.linspace(-1.5, 1.5, rows)[torch.randperm(rows, generator=generator)],
    )


def section(options: PolicyLossOptions) -> AlgorithmSection:
    """The run-file section that asks for the same loss."""
    return AlgorithmSection(
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=None if options.dual_clip == float("inf") else options.dual_clip,
        preclip_min=options.preclip_min,
        preclip_max=options.preclip_max,
        kl_loss_coefficient=options.kl_coefficient,
        kl_loss_estimator=options.kl_estimator,
        kl_loss_bound=0.0 if options.kl_bound == float("inf") else options.kl_bound,
        entropy_coefficient=options.entropy_coefficient,
    )


def truth(logits: torch.Tensor, inputs: TokenInputs, options: PolicyLossOptions, *, temperature: float = 1.0) -> Result:
    """Float64 autograd through log-softmax and `algorithm.policy_loss`; masked rows are cut out, not multiplied."""
    active = inputs.weights != 0
    leaf = logits.double().detach().requires_grad_()
    log_p = (leaf[active] / temperature).log_softmax(-1)
    kept = inputs.take(active)
    log_probs = log_p.gather(1, kept.targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    importance = None
    if options.importance_cap != float("inf"):
        importance = truncated_importance_weights(
            kept.old_log_probs.double(), kept.sampler_log_probs.double(), options.importance_cap
        )
    rejected = ~kept.advantages.isfinite()
    result = policy_loss(
        log_probs,
        kept.old_log_probs.double(),
        kept.advantages.double(),
        section(options),
        importance_weights_R=importance,
        entropy_R=entropy,
        reference_log_probs_R=None if kept.reference_log_probs is None else kept.reference_log_probs.double(),
    )
    loss = result.per_token_loss * kept.weights.double()
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    flags = torch.ones(len(loss), dtype=torch.int32)
    for bit, mask in (
        (2, rejected),
        (4, result.preclipped_low),
        (8, result.preclipped_high),
        (16, result.clipped_low),
        (32, result.clipped_high),
        (64, ~loss.isfinite()),
    ):
        flags += mask.int() * bit

    def whole(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(active), dtype=values.dtype).masked_scatter(active, values.detach())

    return Result(
        log_probs=whole(log_probs), entropy=whole(entropy), loss=whole(loss), flags=whole(flags), gradient=gradient
    )


def run_rows(
    implementation: str,
    logits: torch.Tensor,
    inputs: TokenInputs,
    options: PolicyLossOptions,
    *,
    ranks: int = 1,
    temperature: float = 1.0,
) -> Result:
    """Statistics, loss and gradient by the row kernels, the vocabulary cut into `ranks` shards in this process."""
    kernels = row_kernels(implementation)
    pieces = [piece.clone() for piece in logits.chunk(ranks, dim=1)]
    shards = [VocabularyShard.of_rank(pieces[0].shape[1], rank, logits.shape[1]) for rank in range(ranks)]
    rows = [
        LogitRows(logits=piece, targets=inputs.targets, shard=shard, temperature=temperature)
        for piece, shard in zip(pieces, shards, strict=True)
    ]
    statistics, loss = kernels.loss(torch.stack([kernels.statistics(shard) for shard in rows]), inputs, options)
    for shard in rows:
        kernels.gradient_(
            shard, statistics, loss.grad_log_prob, loss.grad_entropy if options.entropy_coefficient else None
        )
    return Result(
        log_probs=statistics.log_probs,
        entropy=statistics.entropy,
        loss=loss.loss,
        flags=loss.flags,
        gradient=torch.cat(pieces, dim=1),
    )


def on_device(inputs: TokenInputs, device: str) -> TokenInputs:
    """The same inputs elsewhere."""
    return replace(inputs, **{name: None if x is None else x.to(device) for name, x in vars(inputs).items()})


def run_chunk(
    implementation: str,
    logits: torch.Tensor,
    inputs: TokenInputs,
    options: PolicyLossOptions,
    *,
    temperature: float = 1.0,
) -> Result:
    """The loss of a chunk as `linear_policy_loss` forms it, whole-row kernels included; overwrites the logits."""
    rows = LogitRows(
        logits=logits,
        targets=inputs.targets,
        shard=VocabularyShard(start=0, width=logits.shape[1]),
        temperature=temperature,
    )
    head = Head.of_logits(
        logits.shape[1], logits.dtype, logits.device, options=HeadOptions(implementation=implementation), loss=options
    )
    result, gradient_LV, live_L = loss_and_gradient_(head, rows, inputs, options)
    gradient = gradient_LV if live_L is None else torch.zeros_like(logits).index_copy_(0, live_L, gradient_LV)
    return Result(
        log_probs=result.log_probs, entropy=result.entropy, loss=result.loss, flags=result.flags, gradient=gradient
    )


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    norm = float(expected.double().norm())
    difference = float((got.double() - expected.double()).norm())
    return difference if norm == 0.0 else difference / norm


def assert_matches(got: Result, expected: Result, *, gradient_tolerance: float) -> None:
    """float32 accuracy of everything, the given accuracy of the gradient, flags exactly."""
    carries = (expected.flags & 1) != 0  # the rest is read, but of no use
    assert relative(got.log_probs[carries], expected.log_probs[carries]) < 1e-6
    assert relative(got.entropy[carries], expected.entropy[carries]) < 1e-6
    assert relative(got.loss, expected.loss) < 1e-5
    assert relative(got.gradient, expected.gradient) < gradient_tolerance
    assert torch.equal(got.flags, expected.flags)


def replaced(inputs: TokenInputs, **changes: torch.Tensor) -> TokenInputs:
    return replace(inputs, **changes)
