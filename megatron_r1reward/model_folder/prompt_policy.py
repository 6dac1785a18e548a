"""`reward_model.json`: what a trained reward model's folder says about how it is asked, and what it was trained by.

    sft, rl --export--> reward_model.json --read--> serve, score, bench, eval, RewardModel, hub card

The template, the place of the images, the orders and the image sizes are those of its training: who asks otherwise asks
another question than the model learned to answer. A folder without the file (a base model, a released checkpoint) is
asked with the published R1-Reward prompt in both orders.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

FILE = "reward_model.json"
Kind = Literal["generative", "pointwise", "scalar"]
# Of the template, by kind: a generative model compares two responses; a pointwise one, generative as well, rates one;
# a scalar head reads one as the assistant's turn.
FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "generative": ("question", "answer1", "answer2"),
    "pointwise": ("question", "answer"),
    "scalar": ("question",),
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may have written more


class Calibration(_Part):
    """From the probability of one way of voting to one that is right as often as it says: log-odds / `temperature`.

    A model that sees both orders must not change its mind when they are exchanged, so there is no intercept.
    """

    weights: str  # `data.identity.model_identity` of the folder that it was measured on
    aggregator: str
    votes: str  # "adaptive 0.9", or judgements per order: "3"
    temperature: float
    items: int  # held-out items of the fit
    error_before: float  # expected calibration error on the other half of the items
    error_after: float

    def apply(self, probability: float) -> float:
        """The calibrated probability, in (0, 1); 0 and 1 stay."""
        if not 0.0 < probability < 1.0:
            return probability
        odds = (math.log(probability) - math.log1p(-probability)) / self.temperature
        return 1.0 / (1.0 + math.exp(-odds)) if odds >= 0 else math.exp(odds) / (1.0 + math.exp(odds))


class TrainedStage(_Part):
    """One stage of the training, for the model card."""

    stage: Literal["sft", "rl", "rm"]
    version: str  # of this package
    base: str  # name of the folder or repository that the stage began with
    data: str  # name of the file
    rows: int | None  # None: trained from a record that does not say
    steps: int
    settings: Mapping[str, Any]


class CarriedParser(_Part):
    """How verdicts are read from the model's texts (`reward.readers`)."""

    name: str  # of a way, a regular expression, or "path/to/file.py:function"
    source: str | None = None  # the whole file of the function; code: it runs where the user says so


class PromptPolicy(_Part):
    """How the model is asked, and how it answers."""

    format: Literal[1] = 1
    kind: Kind = "generative"
    template: str  # with the fields of its kind
    images: Literal["first"] = "first"  # of the user's turn, then the text
    orders: Literal["both", "any"] = "both"  # both: a verdict in one order alone is refused
    min_pixels: int | None = None  # of the image processor; None: the folder's own
    max_pixels: int | None = None
    parser: CarriedParser | None = None  # None: <answer>1</answer>, as published
    stages: tuple[TrainedStage, ...] = ()
    calibration: tuple[Calibration, ...] = ()
    end_of_turn: str | None = None  # of a scalar model, once its tokenizer has been looked at: ends the response

    @field_validator("template")
    @classmethod
    def _fields(cls, template: str, info: ValidationInfo) -> str:
        check_template(template, FIELDS[info.data.get("kind", "generative")])
        return template

    @property
    def reads_one_response(self) -> bool:
        """Whether it gives each response a number of its own: there are no orders, and N responses cost N calls."""
        return self.kind != "generative"

    @property
    def pixels(self) -> tuple[int, int] | None:
        return None if self.min_pixels is None or self.max_pixels is None else (self.min_pixels, self.max_pixels)

    def of_weights(self, weights: str) -> PromptPolicy:
        """Without the calibrations that were measured on other weights, which a conversion may have carried here."""
        kept = tuple(one for one in self.calibration if one.weights == weights)
        return self.model_copy(update={"calibration": kept})

    def calibrated(self, probability: float | None, *, aggregator: str, votes: str | None) -> float | None:
        """By the calibration of just this way of voting; None where there is none."""
        if probability is None or votes is None:
            return None
        fits = [one for one in self.calibration if (one.aggregator, one.votes) == (aggregator, votes)]
        return fits[0].apply(probability) if fits else None

    def to_json(self) -> str:
        return self.model_dump_json(indent=2, exclude={"end_of_turn"}) + "\n"

    def check_orders(self, both_orders: bool, where: str) -> None:
        """Raises ValueError when one order is asked for and the model is asked in both."""
        if not both_orders and self.orders == "both":
            raise ValueError(
                f'{where}: the model\'s {FILE} says orders "both": ask in both orders, or set it to "any" there'
            )


def check_template(template: str, fields: Sequence[str] = FIELDS["generative"]) -> None:
    """Raises ValueError unless each of the fields, of a pair by default, stands in it once, and nothing else does."""
    try:
        parts = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"not a template: {error}") from error
    if sorted(parts) != sorted((name, "", None) for name in fields):
        raise ValueError(f"a template holds each of {{{'}, {'.join(fields)}}} once and no other field")


def read_policy(folder: Path) -> PromptPolicy | None:
    """None where the folder says nothing.

    Raises:
        ValueError: the file is damaged, or of a later format.
    """
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return PromptPolicy.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        reason = f"{where}: {first['msg'].removeprefix('Value error, ')}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{path} cannot be read ({reason}): export the model again, or mend it")


def own_policy(folder: Path) -> PromptPolicy:
    """`read_policy` of a folder that has to be one of ours.

    Raises:
        ValueError: it says nothing about how it is asked, or as there.
    """
    policy = read_policy(folder)
    if policy is None:
        raise ValueError(
            f"{folder} has no {FILE}: give the folder that `r1reward sft`, `rl` or `rm` has exported (<output_dir>/hf)"
        )
    return policy
