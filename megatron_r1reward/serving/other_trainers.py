"""The service in other programs' training: the requests that they make, answered in their own words.

    POST /openrlhf         {"query": [...], "prompts": [...], "labels": [...]} -> {"rewards": [...]}   (--remote_rm_url)
    POST /slime            {"prompt", "response", "label"} -> a number                                  (--rm-url)
    POST /nemo_gym/compare {"conversation_history", "response_objs", "principle"} -> {"rewards", "comparison_results",
                           "metrics"}                                                         (its comparison server)

OpenRLHF's batches and NeMo-Gym's lists are ranked as they come, equal prompts together; slime's single samples wait for
their cohort (`cohorts`). For TRL and verl, which call a function, see `clients`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from megatron_r1reward.serving import wire
from megatron_r1reward.serving.cohorts import CohortBuffer, NoRewardError, Policy
from megatron_r1reward.serving.service import RewardService

log = logging.getLogger(__name__)


class OpenRlhfRequest(BaseModel):
    """One batch; `query` is prompt and response in one text, as the trainer decoded it."""

    query: list[str]
    prompts: list[str]
    labels: list[Any] | None = None


class SlimeRequest(BaseModel):
    prompt: str
    response: str
    label: Any = None
    images: list[str] = []


class NemoGymRequest(BaseModel):
    conversation_history: list[dict[str, Any]]
    response_objs: list[dict[str, Any]]
    principle: str | None = None


def cohorts_of(service: RewardService, *, size: int, deadline_s: float, on_failure: Policy) -> CohortBuffer:
    """A cohort buffer whose groups are ranked by the service, with its checks."""

    async def rewards(question: str, responses: Sequence[str], images: Sequence[str]) -> Sequence[float]:
        request = wire.RankRequest(question=question, responses=list(responses), images=list(images))
        return list((await service.rank(request))["rewards"])

    return CohortBuffer(rewards, size=size, deadline_s=deadline_s, on_failure=on_failure)


def add_routes(app: FastAPI, service: RewardService, cohorts: CohortBuffer) -> None:
    """The routes of the head of this module, on the service's application."""

    @app.post("/openrlhf")
    async def openrlhf(body: OpenRlhfRequest) -> Any:
        if len(body.query) != len(body.prompts):
            return _refused(f"{len(body.query)} queries, but {len(body.prompts)} prompts")
        texts = [query.removeprefix(prompt) for query, prompt in zip(body.query, body.prompts, strict=True)]
        return {"rewards": await _by_prompt(cohorts, body.prompts, texts)}

    @app.post("/slime")
    async def slime(body: SlimeRequest) -> Any:
        return await cohorts.reward(body.prompt, body.response, body.images)

    @app.post("/nemo_gym/compare")
    async def nemo_gym(body: NemoGymRequest) -> Any:
        question = "\n".join(_text(turn.get("content")) for turn in body.conversation_history)
        if body.principle:
            question += f"\nPrinciple: {body.principle}"
        answer = await service.rank(
            wire.RankRequest(question=question, responses=[response_text(item) for item in body.response_objs])
        )
        results = [
            {"response_i": i, "response_j": j, "winner": None if one["verdict"] is None else (i, j)[one["verdict"] - 1]}
            for one in answer["comparisons"]
            for i, j in [one["pair"]]
        ]
        metrics = {name: answer[name] for name in ("calls", "ties", "unparsable", "confidence")}
        return {"rewards": answer["rewards"], "comparison_results": results, "metrics": metrics}

    @app.exception_handler(NoRewardError)
    async def no_reward(request: object, error: NoRewardError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=503)

    @app.exception_handler(wire.RefusedError)
    async def refused(request: object, error: wire.RefusedError) -> JSONResponse:
        return _refused(str(error))


async def _by_prompt(cohorts: CohortBuffer, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Rewards of a batch: the samples of one prompt are ranked together, here and now."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places[prompt].append(place)
    rewards = [0.0] * len(texts)
    for prompt, members in places.items():
        found = await cohorts.group(prompt, [texts[place] for place in members])
        for place, reward in zip(members, found, strict=True):
            rewards[place] = reward
    return rewards


def response_text(item: dict[str, Any]) -> str:
    """The text of a response object of the Responses API, or of a chat message."""
    if "output" in item:
        return "".join(
            _text(part.get("content")) for part in item["output"] if part.get("type", "message") == "message"
        )
    return _text(item.get("content"))


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or [] if isinstance(part, dict))


def _refused(reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status_code=422)
