"""What a stage reads, and which rows of it it trains on in which steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_r1reward.config.section import Fraction, PositiveInt, Section

MAX_FRAMES = 32  # of a video, as at the published evaluation


class Selection(Section):
    """The rows that `sft`, `rm` and `rl` train on: those that meet all that is set."""

    select: Path | None = None  # JSON list of ids to train on, e.g. the hard set that `r1reward annotate` writes
    categories: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # none: all
    # Attempts that the annotator needed, from and to, by `data.attempts` or, in `sft`, the rows' own column; one more
    # than were made: none was right
    difficulty: tuple[PositiveInt, PositiveInt] | None = None
    accuracy: tuple[Fraction, Fraction] | None = None  # a model's share of right verdicts, by `data.judgements`

    @model_validator(mode="after")
    def _in_order(self) -> Selection:
        for name, span in (("difficulty", self.difficulty), ("accuracy", self.accuracy)):
            if span is not None and span[0] > span[1]:
                raise ValueError(f"{name} {list(span)} goes from the larger to the smaller: exchange them")
        return self

    @property
    def criteria(self) -> dict[str, Any]:
        """What is set, for messages."""
        found = {name: getattr(self, name) for name in Selection.model_fields}
        return {name: str(value) if name == "select" else list(value) for name, value in found.items() if value}


class CurriculumStage(Selection):
    """So many steps with some of the rows. Every stage but the last says where it ends."""

    until_step: PositiveInt | None = None  # the last step that belongs to it, counted from 1 over the whole run
    epochs: PositiveInt | None = None  # or so many passes over its rows, the last step filled up


class DataSection(Selection):
    train: Path
    curriculum: tuple[CurriculumStage, ...] = ()  # stages one after the other; none: all rows at all steps
    attempts: Path | None = None  # attempts.jsonl of `r1reward annotate`, which says how difficult rows are
    judgements: Path | None = None  # judgements.jsonl of `r1reward bench pairs`, which says what a model can do
    image_root: Path | None = None  # relative image paths are resolved against it; None: the folder of the data
    image_roots: tuple[Path, ...] = ()  # further folders that image paths and links may lead to
    max_frames: PositiveInt = MAX_FRAMES  # of a video, evenly spaced
    max_pixels: PositiveInt = 501_760  # 640 * 28 * 28, the published training setting
    min_pixels: PositiveInt = 3_136  # 4 * 28 * 28
    token_budget: PositiveInt = 8192  # tokens of one packed micro-batch
    swap: Literal["random", "never", "always"] = "random"  # order of the two responses, redrawn every epoch
    max_prompt_tokens: PositiveInt = 20_480

    @model_validator(mode="after")
    def _pixels(self) -> DataSection:
        if self.max_pixels < self.min_pixels:
            raise ValueError(
                f"data.max_pixels {self.max_pixels} is below data.min_pixels {self.min_pixels}: no image has a size "
                "between them; exchange them"
            )
        return self

    @model_validator(mode="after")
    def _sources(self) -> DataSection:
        for where, one in self._selections:
            if one.accuracy is not None and self.judgements is None:
                raise ValueError(
                    f"{where}accuracy needs data.judgements, the judgements.jsonl of `r1reward bench pairs`: name it"
                )
        return self

    @property
    def _selections(self) -> list[tuple[str, Selection]]:
        stages = enumerate(self.curriculum, start=1)
        return [("data.", self), *((f"data.curriculum stage {number}: ", one) for number, one in stages)]

    def check_attempts(self) -> None:
        """ValueError where difficulty is asked for of rows that do not say it themselves, and no file does."""
        for where, one in self._selections:
            if one.difficulty is not None and self.attempts is None:
                raise ValueError(
                    f"{where}difficulty needs data.attempts, the attempts.jsonl that `r1reward annotate` wrote: name it"
                )

    @model_validator(mode="after")
    def _stages_follow(self) -> DataSection:
        last = 0
        for number, stage in enumerate(self.curriculum, start=1):
            ends = [value for value in (stage.until_step, stage.epochs) if value is not None]
            if number == len(self.curriculum):
                if ends:
                    raise ValueError(
                        f"data.curriculum stage {number} is the last one and goes on to the run's last step: "
                        "leave until_step and epochs out"
                    )
            elif len(ends) != 1:
                raise ValueError(
                    f"data.curriculum stage {number} needs until_step or epochs, one of them: where it ends"
                )
            elif stage.until_step is not None:
                if stage.until_step <= last:
                    raise ValueError(
                        f"data.curriculum stage {number} ends at step {stage.until_step}, and the one before at "
                        f"{last}: let until_step increase"
                    )
                last = stage.until_step
        return self
