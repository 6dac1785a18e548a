"""POST /get_reward_mllm: the remote-reward protocol of the released training code, with this package's reward.

Request {"query": [decoded sequence, ...], "prompts": [`message` of the data set, ...]}, response {"rewards": [R, ...]}
in the same order, or 400 {"error": "..."}. A sequence is the whole dialogue with its special tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.data.rows import RowError, iterate_rows, label_of
from megatron_r1reward.network.guard import BearerGuard
from megatron_r1reward.reward.consistency import ConsistencyJudge, JudgeDownError
from megatron_r1reward.reward.rules import (
    ParsedResponse,
    consistency_value,
    format_reward,
    is_right,
    parse_response,
    result_reward,
)
from megatron_r1reward.reward.terms import own_terms, reward_of
from megatron_r1reward.types import JudgeVerdict, Label

log = logging.getLogger(__name__)

ROUTE = "/get_reward_mllm"
_ASSISTANT = "<|im_start|>assistant\n"
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class UnknownMessageError(ValueError):
    """The prompt is not in the data set, or it is there with two different answers."""


class LabelTable:
    """Label of every `message` of a data set in the released schema (`message`, `answer`).

    The released server falls back to the most similar text when a message is unknown, and lets the last of several
    equal messages win; here the first is an error, and so are equal messages with different answers.

    Raises:
        ValueError: no row of the file has a message and an answer of 1 or 2.
    """

    def __init__(self, path: Path) -> None:
        self.skipped = 0  # rows without a usable message and answer
        self._labels: dict[str, Label] = {}
        self.ambiguous: set[str] = set()  # in the spelling of `_key`
        for row in iterate_rows(path):
            fields = row.fields or {}
            message = fields.get("message")
            try:
                label = label_of(fields.get("answer"))
            except RowError:
                self.skipped += 1
                continue
            if not isinstance(message, str | list):
                self.skipped += 1
            elif self._labels.setdefault(_key(message), label) != label:
                self.ambiguous.add(_key(message))
        if not self._labels:
            raise ValueError(
                f"{path}: no row has a `message` and an `answer` that is 1 or 2: give the file that the training "
                "reads, in the schema of R1-Reward-RL"
            )

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, message: str) -> Label:
        """Raises UnknownMessageError where the data set has no single answer."""
        key = _key(message)
        if key in self.ambiguous:
            raise UnknownMessageError(f"the data set has two different answers to {message[:200]!r}")
        try:
            return self._labels[key]
        except KeyError:
            raise UnknownMessageError(f"no row of the data set has the message {message[:200]!r}") from None


def _key(message: Any) -> str:
    """A message in one spelling, whether the data hold it as lists or as JSON text, whatever its white space."""
    if isinstance(message, str):
        try:
            message = json.loads(message)
        except (ValueError, RecursionError):
            return str(message)  # not a chat: any text may be a key
    return json.dumps(message, sort_keys=True)


class RewardRequest(BaseModel):
    """One micro-batch of rollouts."""

    query: list[str]
    prompts: list[str]

    @model_validator(mode="after")
    def _pairs(self) -> RewardRequest:
        if len(self.query) != len(self.prompts):
            raise ValueError(f"{len(self.query)} queries, but {len(self.prompts)} prompts")
        return self


class RemoteReward:
    """R = 0.5 F + A (1 + 0.5 C) of decoded sequences; requests are independent and may run side by side."""

    def __init__(self, section: RewardSection, labels: LabelTable, judge: ConsistencyJudge | None) -> None:
        known = own_terms(0.0, 0.0, 0.0)
        if unknown := [term.name for term in section.all_terms if term.name not in known]:
            raise ValueError(
                f"reward.terms: this protocol sends one response at a time and knows {', '.join(known)}: remove "
                f"{', '.join(unknown)}"
            )
        self._section = section
        self._labels = labels
        self._judge = judge if section.use_judge else None

    async def rewards(self, queries: Sequence[str], messages: Sequence[str]) -> list[float]:
        """Rewards in the order of the queries.

        Raises:
            UnknownMessageError: a message has no label.
            JudgeDownError: the judge has been silent for too long.
        """
        labels = [self._labels.label(message) for message in messages]
        parsed = [parse_response(response_of(query)) for query in queries]
        right = [i for i, label in enumerate(labels) if is_right(parsed[i].answer, label)]
        verdicts: dict[int, JudgeVerdict] = {}
        if self._judge is not None:
            answers = await self._judge.judge_many([(parsed[i].reasoning, labels[i]) for i in right])
            verdicts = dict(zip(right, answers, strict=True))
        return [self._reward(parsed[i], label, verdicts.get(i, "not_asked")) for i, label in enumerate(labels)]

    def _reward(self, parsed: ParsedResponse, label: Label, verdict: JudgeVerdict) -> float:
        consistency = consistency_value(verdict, self._section.consistency_levels)
        return reward_of(own_terms(format_reward(parsed), result_reward(parsed, label), consistency), self._section)


def response_of(query: str) -> str:
    """What the model wrote: after the first assistant header, without the end and padding tokens behind it. Those
    inside stay: a response that holds them is not well formed."""
    response = (query.partition(_ASSISTANT)[2] if _ASSISTANT in query else query).strip()
    while ended := next((token for token in _END_TOKENS if response.endswith(token)), None):
        response = response.removesuffix(ended).rstrip()
    return response


def reward_app(rewards: RemoteReward, *, token: str | None) -> Starlette:
    """The service. With `token` every request but /health must carry it as a bearer token."""

    async def get_reward(request: Request) -> JSONResponse:
        try:
            asked = RewardRequest.model_validate_json(await request.body())
            return JSONResponse({"rewards": await rewards.rewards(asked.query, asked.prompts)})
        except (ValidationError, UnknownMessageError) as error:
            return _error(400, str(error))
        except JudgeDownError as error:  # 500: the original client asks again, then stops
            log.error("%s", error)
            return _error(500, str(error))

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[Route(ROUTE, get_reward, methods=["POST"]), Route("/health", health)],
        middleware=[] if token is None else [Middleware(BearerGuard, token=token)],
    )


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)
