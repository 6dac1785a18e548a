"""Which examples a step sees: a pure function of (seed, step), so that a resumed run needs only its step number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np

from megatron_r1reward.config.schema import DataSection
from megatron_r1reward.data.prompt import PromptBuilder
from megatron_r1reward.types import Preference, Prompt


class _Row(Protocol):
    @property
    def id(self) -> str: ...


RowT = TypeVar("RowT", bound=_Row)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Example `index` in pass `epoch` over the data; of a stage's rows passes are "stage2-0", "stage2-1", ..."""

    index: int
    epoch: int | str


def seeded_sample(rows: Sequence[RowT], count: int | None, *, seed: int) -> tuple[RowT, ...]:
    """`count` of the rows (all for None) in their order, drawn by hashing seed and id: files often begin with one
    category. The order of the file does not matter, and a larger sample holds the smaller ones."""
    if count is None or count >= len(rows):
        return tuple(rows)
    lots = [hashlib.sha256(f"{seed}/{row.id}".encode()).digest() for row in rows]
    drawn = sorted(sorted(range(len(rows)), key=lots.__getitem__)[:count])
    return tuple(rows[index] for index in drawn)


class EpochSampler:
    """Every example once per epoch, in an order drawn anew for each epoch; batches run across epoch ends.

    Args:
        draws: after which the last batch ends, so that passes are whole; None: batches are always full.
        at_least: examples of a batch all the same: one for every data-parallel rank.
    """

    def __init__(self, size: int, *, seed: int, draws: int | None = None, at_least: int = 1) -> None:
        if size < 1:
            raise ValueError("there is nothing to sample from: the data set has no rows")
        self.size, self.seed = size, seed
        self._draws, self._at_least = draws, at_least
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.size)

    def batch(self, step: int, batch_size: int) -> list[Draw]:
        """The draws of step `step` (counted from 0) at a constant batch size."""
        first, end = step * batch_size, (step + 1) * batch_size
        if self._draws is not None:
            end = max(min(end, self._draws), first + self._at_least)
        draws = []
        for position in range(first, end):
            epoch, offset = divmod(position, self.size)
            draws.append(Draw(index=int(self._order(epoch)[offset]), epoch=epoch))
        return draws


def is_swapped(mode: str, *, seed: int, epoch: int | str, preference_id: str) -> bool:
    """Whether the two responses change places: a fair coin per (seed, epoch, preference) when `mode` is "random"."""
    if mode != "random":
        return mode == "always"
    return bool(hashlib.sha256(f"{seed}/{epoch}/{preference_id}".encode()).digest()[0] & 1)


@dataclass(frozen=True, kw_only=True)
class DataStage:
    """Steps [`first`, `end`), counted from 0, train on `rows`, places in the preferences; `end` None: to the last."""

    first: int
    end: int | None
    rows: tuple[int, ...]


class StagedSampler:
    """The rows of a step: of all rows, or of its stage in a curriculum, each stage passing over its own from its first
    step on.

    Args:
        draws, at_least: see `EpochSampler`; the batches of stages are always full.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        stages: Sequence[DataStage] = (),
        draws: int | None = None,
        at_least: int = 1,
    ) -> None:
        self._size, self._stages = size, stages
        self._all = EpochSampler(size, seed=seed, draws=draws, at_least=at_least)
        self._of_stages = [EpochSampler(len(stage.rows), seed=seed) for stage in stages]

    def batch(self, step: int, batch_size: int) -> list[Draw]:
        """The draws of step `step` (counted from 0) at a constant batch size."""
        number = self._stage_at(step)
        if number is None:
            return self._all.batch(step, batch_size)
        stage = self._stages[number]
        draws = self._of_stages[number].batch(step - stage.first, batch_size)
        return [Draw(index=stage.rows[one.index], epoch=f"stage{number + 1}-{one.epoch}") for one in draws]

    def rows_at(self, step: int) -> Sequence[int]:
        """Places of the rows that a step may train on."""
        number = self._stage_at(step)
        return range(self._size) if number is None else self._stages[number].rows

    def _stage_at(self, step: int) -> int | None:
        return next((n for n, stage in enumerate(self._stages) if stage.end is None or step < stage.end), None)


class PromptLoader:
    """Prompts for rollout batches.

    Args:
        stages: a curriculum; none: all rows at every step.
        both_orders: every preference gives two prompts, its two orders (of a pointwise template: its two responses),
            which stand next to each other and are one group; else one prompt, in an order that is drawn.
    """

    def __init__(
        self,
        preferences: Sequence[Preference],
        builder: PromptBuilder,
        section: DataSection,
        *,
        seed: int,
        stages: Sequence[DataStage] = (),
        both_orders: bool = False,
    ) -> None:
        self.preferences, self.builder, self.section, self.seed = preferences, builder, section, seed
        self.orders = 2 if both_orders else 1  # prompts per preference
        self._sampler = StagedSampler(len(preferences), seed=seed, stages=stages)

    def batch(self, step: int, batch_size: int) -> list[Prompt]:
        """`batch_size` prompts; with both orders, of half as many preferences."""
        draws = self._sampler.batch(step, batch_size // self.orders)
        return [prompt for draw in draws for prompt in self.prompts(draw.index, draw.epoch)]

    def rows_at(self, step: int) -> Sequence[int]:
        """Places of the preferences that a step may train on."""
        return self._sampler.rows_at(step)

    def prompts(self, index: int, occurrence: int | str) -> list[Prompt]:
        """Of example `index`, `self.orders` of them. Which order a single one has is drawn from the seed and
        `occurrence`, its epoch as a rule."""
        preference = self.preferences[index]
        if self.orders == 2:
            both = [self.builder.build(preference, swapped=swapped, occurrence=occurrence) for swapped in (False, True)]
            return [replace(prompt, group=f"{preference.id}/{occurrence}") for prompt in both]
        swapped = is_swapped(self.section.swap, seed=self.seed, epoch=occurrence, preference_id=preference.id)
        return [self.builder.build(preference, swapped=swapped, occurrence=occurrence)]
