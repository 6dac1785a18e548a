"""Inputs and switches of the fused policy loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from megatron_r1reward.config.schema import AlgorithmSection

Filter = Literal["none", "paper", "released_code"]
KlEstimator = Literal["k1", "k2", "k3"]
FILTERS: tuple[Filter, ...] = ("none", "paper", "released_code")
KL_ESTIMATORS: tuple[KlEstimator, ...] = ("k1", "k2", "k3")


@dataclass(frozen=True, kw_only=True)
class PolicyLossOptions:
    """Numbers of the loss; the formulas stand in `algorithm.policy_loss`.

    Infinite bounds switch a clip off. `filter` judges the standardised advantage; "none" still rejects values that are
    not finite. `temperature` divides the logits before the softmax.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = math.inf
    preclip_min: float = 1e-3
    preclip_max: float = 1e3
    filter: Filter = "none"
    filter_sigma: float = 3.0
    kl_coefficient: float = 0.0
    kl_estimator: KlEstimator = "k3"
    entropy_coefficient: float = 0.0
    importance_cap: float = math.inf
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it divides the logits, choose a value above 0")
        if not self.preclip_min < 1.0 < self.preclip_max:
            raise ValueError(f"preclip_min {self.preclip_min} and preclip_max {self.preclip_max} must enclose 1")

    @classmethod
    def from_config(cls, config: AlgorithmSection) -> PolicyLossOptions:
        """The run file's loss. Its advantages come standardised and filtered, hence `filter="none"`."""
        return cls(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=math.inf if config.dual_clip is None else config.dual_clip,
            preclip_min=config.preclip_min if config.preclip else 0.0,
            preclip_max=config.preclip_max if config.preclip else math.inf,
            kl_coefficient=config.kl_loss_coefficient,
            kl_estimator=config.kl_loss_estimator,
            entropy_coefficient=config.entropy_coefficient,
            importance_cap=config.truncated_importance_sampling or math.inf,
        )

    def pack(self) -> list[float]:
        """As numbers, the form in which they pass through a `torch.library` operator."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["filter"] = FILTERS.index(self.filter)
        values["kl_estimator"] = KL_ESTIMATORS.index(self.kl_estimator)
        return [float(value) for value in values.values()]

    @classmethod
    def unpack(cls, numbers: Sequence[float]) -> PolicyLossOptions:
        """The inverse of `pack`."""
        values: dict[str, object] = dict(zip((field.name for field in fields(cls)), numbers, strict=True))
        values["filter"] = FILTERS[int(numbers[5])]
        values["kl_estimator"] = KL_ESTIMATORS[int(numbers[8])]
        return cls(**values)  # type: ignore[arg-type]

    @property
    def log_bounds(self) -> tuple[float, float, float, float, float]:
        """Natural logs: Pre-CLIP low and high, clip low (A < 0), clip high (A > 0), dual clip (A < 0)."""
        low = math.log(self.preclip_min) if self.preclip_min > 0 else -math.inf
        return low, math.log(self.preclip_max), math.log1p(-self.clip_low), math.log1p(self.clip_high), self._log_dual

    @property
    def _log_dual(self) -> float:
        return math.log(self.dual_clip)

    @property
    def every_row_has_gradient(self) -> bool:
        """The KL and entropy terms reach rows without an advantage, too."""
        return self.kl_coefficient != 0.0 or self.entropy_coefficient != 0.0


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """What the loss needs beside the logits, one entry per row. float32 unless noted.

    `weights` are the aggregation weights (`algorithm.policy_loss.aggregation_weights`); 0 masks a row, whatever else it
    holds. `standardization` = [mean, 1 / std] of the raw advantages on the device; None: they are standardised.
    """

    targets: torch.Tensor  # int64 [R], global token ids
    old_log_probs: torch.Tensor  # [R]
    advantages: torch.Tensor  # [R]
    weights: torch.Tensor  # [R]
    reference_log_probs: torch.Tensor | None = None  # [R], needed when kl_coefficient is not 0
    sampler_log_probs: torch.Tensor | None = None  # [R], needed when importance_cap is finite
    standardization: torch.Tensor | None = None  # [2]

    def check(self, rows: int, options: PolicyLossOptions) -> None:
        """ValueError when a tensor is missing or has another length or type."""
        if options.kl_coefficient != 0.0 and self.reference_log_probs is None:
            raise ValueError(f"kl_coefficient is {options.kl_coefficient}: pass reference_log_probs, or set it to 0")
        if math.isfinite(options.importance_cap) and self.sampler_log_probs is None:
            raise ValueError(
                f"importance_cap is {options.importance_cap}: pass sampler_log_probs, or leave it infinite"
            )
        for name, tensor in self._per_row().items():
            if tensor.shape != (rows,):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} beside {rows} rows of logits: pass [{rows}]")
            dtype = torch.int64 if name == "targets" else torch.float32
            if tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(f"{name} is {tensor.dtype} with stride {tensor.stride()}: pass contiguous {dtype}")

    def take(self, rows: torch.Tensor | slice) -> TokenInputs:
        """The given rows of every tensor."""
        return replace(self, **{name: tensor[rows] for name, tensor in self._per_row().items()})

    def _per_row(self) -> dict[str, torch.Tensor]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None and name != "standardization"}


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
