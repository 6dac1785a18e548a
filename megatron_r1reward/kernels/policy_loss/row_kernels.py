"""The contract of the row kernels: from rows of logits to losses, and to the gradient written over those logits.

    statistics(rows)                 four numbers per row of each vocabulary shard    [4, R]
    loss(parts of all shards, ...)   log-probs, entropies, losses, slopes, flags      [R]
    gradient_(rows, ...)             d loss / d logits over the logits                [R, V / tp]

Three modules fulfil it: `torch_rows` (any device), `triton_rows`, and for whole rows in one launch `cuda_cluster` and
`triton_rows.whole_rows_`. `choose_kernel` picks one.

Suffixes name axes: `_R` rows (one per response token), `_V` the columns of this rank, `_T` tensor-parallel ranks.
Statistics live in the log2 domain, z = logit * log2(e) / temperature. The four numbers of a shard are

    peak      m = max z
    total     s = sum 2^(z - m)
    weighted  t = sum 2^(z - m) (z - m)      shifted, so that the entropy does not cancel
    target    z of the row's target, -inf where another rank holds it
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import IntFlag
from typing import Literal, Protocol

import torch

from megatron_r1reward.config.schema import AlgorithmSection

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

KlEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS: tuple[KlEstimator, ...] = ("k1", "k2", "k3")


class Flag(IntFlag):
    """What happened to a row, as bits of one int32: metrics cost no second pass.

    The Triton and CUDA sources hold the same numbers; a test compares them through the torch implementation.
    """

    ACTIVE = 1  # its aggregation weight is not 0
    REJECTED = 2  # active, and its advantage is not finite
    PRECLIPPED_LOW = 4
    PRECLIPPED_HIGH = 8
    CLIPPED_LOW = 16
    CLIPPED_HIGH = 32  # dual clip included
    NON_FINITE = 64  # the loss or its gradient is NaN or infinite


def count_flags(flags_R: torch.Tensor) -> dict[str, int]:
    """Number of rows that carry each flag, by lower-case name. One device synchronisation."""
    bits = torch.tensor([int(flag) for flag in Flag], dtype=flags_R.dtype, device=flags_R.device)
    counts = ((flags_R[:, None] & bits) != 0).sum(0).tolist()
    return {str(flag.name).lower(): int(number) for flag, number in zip(Flag, counts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class PolicyLossOptions:
    """Numbers of the loss; the formulas stand in `algorithm.policy_loss`. Infinite bounds switch a clip off."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = math.inf
    preclip_min: float = 1e-3
    preclip_max: float = 1e3
    kl_coefficient: float = 0.0
    kl_estimator: KlEstimator = "k3"
    kl_bound: float = math.inf  # of k3, nats per token
    entropy_coefficient: float = 0.0
    importance_cap: float = math.inf

    def __post_init__(self) -> None:
        if not self.preclip_min < 1.0 < self.preclip_max:
            raise ValueError(f"preclip_min {self.preclip_min} and preclip_max {self.preclip_max} must enclose 1")

    @classmethod
    def from_config(cls, config: AlgorithmSection) -> PolicyLossOptions:
        """The run file's loss; its advantages come standardised and filtered.

        Raises:
            ValueError: the loss is one that no kernel forms.
        """
        if config.loss != "ppo":
            raise ValueError(
                f"the LM head forms the loss 'ppo' only, algorithm.loss is {config.loss!r}: use policy_loss"
            )
        return cls(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip or math.inf,
            preclip_min=config.preclip_min if config.preclip else 0.0,
            preclip_max=config.preclip_max if config.preclip else math.inf,
            kl_coefficient=config.kl_loss_coefficient,
            kl_estimator=config.kl_loss_estimator,
            kl_bound=config.kl_loss_bound or math.inf,
            entropy_coefficient=config.entropy_coefficient,
            importance_cap=config.truncated_importance_sampling or math.inf,
        )

    @property
    def log_bounds(self) -> tuple[float, float, float, float, float]:
        """Natural logs: Pre-CLIP low and high, clip low (A < 0), clip high (A > 0), dual clip (A < 0)."""
        low = math.log(self.preclip_min) if self.preclip_min > 0 else -math.inf
        high, dual = math.log(self.preclip_max), math.log(self.dual_clip)
        clip_low = math.log1p(-self.clip_low) if self.clip_low < 1.0 else -math.inf
        return low, high, clip_low, math.log1p(self.clip_high), dual

    @property
    def every_row_has_gradient(self) -> bool:
        """The KL and entropy terms reach rows without an advantage, too."""
        return self.kl_coefficient != 0.0 or self.entropy_coefficient != 0.0


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """What the loss needs beside the logits, one entry per row. float32 unless noted.

    `weights` are the aggregation weights (`algorithm.policy_loss.aggregation_weights`); 0 masks a row, whatever else it
    holds.
    """

    targets: torch.Tensor  # int64 [R], global token ids
    old_log_probs: torch.Tensor  # [R]
    advantages: torch.Tensor  # [R]
    weights: torch.Tensor  # [R]
    reference_log_probs: torch.Tensor | None = None  # [R], needed when kl_coefficient is not 0
    sampler_log_probs: torch.Tensor | None = None  # [R], needed when importance_cap is finite

    def check(self, rows: int, options: PolicyLossOptions) -> None:
        """ValueError when a tensor is missing or has another length or type."""
        if options.kl_coefficient != 0.0 and self.reference_log_probs is None:
            raise ValueError(f"kl_coefficient is {options.kl_coefficient}: pass reference_log_probs, or set it to 0")
        if math.isfinite(options.importance_cap) and self.sampler_log_probs is None:
            raise ValueError(
                f"importance_cap is {options.importance_cap}: pass sampler_log_probs, or leave it infinite"
            )
        for name, tensor in self._present().items():
            if tensor.shape != (rows,):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} beside {rows} rows of logits: pass [{rows}]")
            dtype = torch.int64 if name == "targets" else torch.float32
            if tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(f"{name} is {tensor.dtype} with stride {tensor.stride()}: pass contiguous {dtype}")

    def take(self, rows: torch.Tensor | slice) -> TokenInputs:
        """The given rows of every tensor."""
        return replace(self, **{name: tensor[rows] for name, tensor in self._present().items()})

    def _present(self) -> dict[str, torch.Tensor]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}


@dataclass(frozen=True, kw_only=True)
class VocabularyShard:
    """Columns of this rank: global ids [start, start + width); columns beyond `width` are padding."""

    start: int
    width: int

    @classmethod
    def of_rank(cls, columns: int, rank: int, vocab_size: int | None) -> VocabularyShard:
        """The shard of tensor-parallel rank `rank` when every rank holds `columns` columns.

        `vocab_size`: columns of the whole vocabulary that are no padding; None: all of them.
        """
        start = rank * columns
        width = columns if vocab_size is None else max(0, min(columns, vocab_size - start))
        return cls(start=start, width=width)


@dataclass(frozen=True, kw_only=True)
class LogitRows:
    """Rows of this rank's logits and what turns them into a distribution."""

    logits: torch.Tensor  # float32, bfloat16 or float16 [R, V / tp]; rows may be strided, columns are contiguous
    targets: torch.Tensor  # int64 [R], global token ids
    shard: VocabularyShard
    temperature: float = 1.0  # divides the logits

    def take(self, rows: torch.Tensor) -> LogitRows:
        """A copy of the given rows."""
        return replace(self, logits=self.logits[rows], targets=self.targets[rows])


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """Float32 [R] each, the same bits on every tensor-parallel rank."""

    log_probs: torch.Tensor  # of the targets, natural log
    entropy: torch.Tensor  # nats
    normalizer: torch.Tensor  # log2 sum 2^z: what the backward needs to rebuild probabilities

    def take(self, rows: torch.Tensor) -> RowStatistics:
        """Those of the given rows."""
        return RowStatistics(
            log_probs=self.log_probs[rows], entropy=self.entropy[rows], normalizer=self.normalizer[rows]
        )


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """[R] each, float32 but for `flags`; rows with weight 0 hold exact zeros."""

    loss: torch.Tensor  # weighted
    grad_log_prob: torch.Tensor  # g_a = d loss / d log-prob
    grad_entropy: torch.Tensor  # g_b = d loss / d entropy
    flags: torch.Tensor  # int32, see Flag


@dataclass(frozen=True, kw_only=True)
class WholeRowLoss:
    """[R] each; what a whole-row kernel leaves beside the gradient in the logits' place."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    loss: torch.Tensor  # weighted
    has_gradient: torch.Tensor  # bool
    flags: torch.Tensor  # int32, see Flag


class RowKernels(Protocol):
    """No atomics, and ranks are merged in rank order: the same bits on every run and every rank."""

    def statistics(self, rows: LogitRows) -> torch.Tensor:
        """The four numbers of this shard for each row, float32 [4, R]; one read of the logits."""

    def loss(
        self, parts_T4R: torch.Tensor, inputs: TokenInputs, options: PolicyLossOptions
    ) -> tuple[RowStatistics, TokenLoss]:
        """Merge the parts of all ranks and evaluate the loss of each row.

        A row without any finite logit gives log-prob and entropy NaN. Rows of weight 0 have loss and slopes 0.
        """

    def gradient_(
        self,
        rows: LogitRows,
        statistics: RowStatistics,
        grad_log_prob_R: torch.Tensor,
        grad_entropy_R: torch.Tensor | None,
    ) -> None:
        """Overwrite the logits with (g_a ([y] - p) - g_b p (ln p + H)) / temperature, computed in float32 and rounded
        once; padding columns with 0.

        Rows whose slopes are both 0 are not read, only zeroed. `grad_entropy_R` None: there is no entropy term.
        """


class WholeRowKernel(Protocol):
    """Statistics, loss and gradient in one launch, where this rank holds the whole vocabulary."""

    def __call__(self, rows: LogitRows, inputs: TokenInputs, options: PolicyLossOptions) -> WholeRowLoss:
        """Overwrites the logits with their gradient."""
