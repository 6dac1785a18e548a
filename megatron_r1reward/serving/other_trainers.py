"""The service in other programs' training: the requests that they make, answered in their own words.

    POST /openrlhf         {"query": [...], "prompts": [...], "labels": [...]} -> {"rewards": [...]}   (--remote_rm_url)
    POST /slime            {"prompt", "response", "label"} -> a number                                  (--rm-url)
    POST /nemo_gym/compare {"conversation_history", "response_objs", "principle"} -> {"rewards", "comparison_results",
                           "metrics"}                                                         (its comparison server)

Samples that come one at a time (slime's, and those of newer OpenRLHF) wait for their cohort (`cohorts`); those of one
prompt that come in one batch, and NeMo-Gym's lists, are ranked as they come. For TRL and verl, which call a function,
see `clients`.

A trainer's prompt is its chat template around a question; its sequence is that prompt and a response that ends with a
token of the format. Both are taken as what they say: a judge must not see the format, and tokens inside a response are
what `wire` refuses. ChatML (Qwen) and Llama 3's format are known; a text without them stays as it is.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from megatron_r1reward.judging.rewards import kind_of
from megatron_r1reward.serving import wire
from megatron_r1reward.serving.cohorts import CohortBuffer, NoRewardError, Policy
from megatron_r1reward.serving.service import RewardService

_HEADER = re.compile(r"<\|im_start\|>(\w+)\n|<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*")
_IMAGES = re.compile(r"<\|vision_start\|>(?:<\|(?:image|video)_pad\|>)*<\|vision_end\|>|<\|image\|>")
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")
_BEGINS = ("<|begin_of_text|>", "<|endoftext|>", "<|im_end|>")  # also padding on the left


def question_of(prompt: str | list[dict[str, Any]]) -> str:
    """What a prompt asks: the turns of a conversation but for the system's, one after the other."""
    if not isinstance(prompt, str):
        return "\n".join(content_text(turn.get("content")) for turn in prompt if turn.get("role") != "system")
    prompt = _without_begins(prompt)
    headers = list(_HEADER.finditer(prompt))
    if not headers:
        return _IMAGES.sub("", prompt)
    turns = [
        (header[1] or header[2], without_ends(prompt[header.end() : following]))
        for header, following in zip(headers, [*(h.start() for h in headers[1:]), len(prompt)], strict=True)
    ]
    return "\n".join(_IMAGES.sub("", text) for role, text in turns if role != "system" and text)


def response_in(query: str, prompt: str) -> str:
    """What follows the prompt in a whole sequence, without the tokens that end it.

    Raises:
        ValueError: the sequence does not hold its prompt.
    """
    query, prompt = _without_begins(query), _without_begins(prompt)
    if query.startswith(prompt):
        return without_ends(query[len(prompt) :])
    # Images were expanded between the two, or a tokenizer changed white space: as many headers as the prompt has.
    count = len(_HEADER.findall(prompt))
    headers = list(_HEADER.finditer(query))
    if not count or len(headers) < count:
        raise ValueError("a query does not begin with its prompt: send both as the trainer's tokenizer decodes them")
    return without_ends(query[headers[count - 1].end() :])


def content_text(content: Any) -> str:
    """The text of a message's content: text itself, or parts of which some are text."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or [] if isinstance(part, dict))


def without_ends(text: str) -> str:
    """A turn without the tokens that end it."""
    text = text.strip()
    while ended := next((token for token in _ENDS if text.endswith(token)), None):
        text = text.removesuffix(ended).rstrip()
    return text


def _without_begins(text: str) -> str:
    while begun := next((token for token in _BEGINS if text.startswith(token)), None):
        text = text.removeprefix(begun)
    return text


class OpenRlhfRequest(BaseModel):
    """Samples; `query` is prompt and response in one text, as the trainer decoded it."""

    query: list[str]
    prompts: list[str]
    labels: list[Any] | None = None


class SlimeRequest(BaseModel):
    prompt: str | list[dict[str, Any]]  # a conversation where the trainer does not apply its template
    response: str
    label: Any = None
    images: list[str] = []


class NemoGymRequest(BaseModel):
    conversation_history: list[dict[str, Any]]
    response_objs: list[dict[str, Any]]
    principle: str | None = None


def cohorts_of(service: RewardService, *, size: int, deadline_s: float, on_failure: Policy) -> CohortBuffer:
    """A cohort buffer whose groups are ranked by the service; its counts are in the service's metrics.

    Raises:
        ValueError: the size or the time cannot be meant, or a model without one is to give the reward of a draw.
    """
    kind = kind_of(service.backend.model)
    if kind != "generative":
        if on_failure == "neutral":
            raise ValueError(f'on_failure "neutral": a {kind} reward model has no reward of a draw: use "raise"')
        size = 1
    elif size < 2:
        raise ValueError(f"cohorts of {size}: a model that compares needs at least two responses")

    async def rewards(question: str, responses: Sequence[str], images: Sequence[str]) -> Sequence[float]:
        request = wire.RankRequest(question=question, responses=list(responses), images=list(images))
        return list((await service.rank(request))["rewards"])

    buffer = CohortBuffer(rewards, limits=service.limits, size=size, deadline_s=deadline_s, on_failure=on_failure)
    service.telemetry.cohorts = buffer.counts
    return buffer


def add_routes(app: FastAPI, service: RewardService, cohorts: CohortBuffer) -> None:
    """The routes of the head of this module, on the service's application."""

    @app.post("/openrlhf")
    async def openrlhf(body: OpenRlhfRequest) -> Any:
        if len(body.query) != len(body.prompts):
            raise wire.RefusedError(f"{len(body.query)} queries, but {len(body.prompts)} prompts")
        try:
            texts = [response_in(query, prompt) for query, prompt in zip(body.query, body.prompts, strict=True)]
        except ValueError as error:
            raise wire.RefusedError(str(error)) from error
        return {"rewards": await _by_prompt(cohorts, body.prompts, texts)}

    @app.post("/slime")
    async def slime(body: SlimeRequest) -> Any:
        return await cohorts.reward(question_of(body.prompt), without_ends(body.response), body.images)

    @app.post("/nemo_gym/compare")
    async def nemo_gym(body: NemoGymRequest, request: Request) -> Response:
        return await service.admitted(request, "nemo_gym", _nemo_gym(service, body))

    @app.exception_handler(NoRewardError)
    async def no_reward(request: object, error: NoRewardError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=503)

    @app.exception_handler(wire.RefusedError)
    async def refused(request: object, error: wire.RefusedError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=422)


async def _by_prompt(cohorts: CohortBuffer, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Rewards of a batch: samples of one prompt are ranked together, here and now; single ones wait for others."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places[prompt].append(place)

    async def of(prompt: str, members: Sequence[int]) -> list[float]:
        question = question_of(prompt)
        if len(members) == 1:
            return [await cohorts.reward(question, texts[members[0]])]
        return await cohorts.group(question, [texts[place] for place in members])

    found = await asyncio.gather(*(of(prompt, members) for prompt, members in places.items()))
    rewards = [0.0] * len(texts)
    for members, group in zip(places.values(), found, strict=True):
        for place, reward in zip(members, group, strict=True):
            rewards[place] = reward
    return rewards


async def _nemo_gym(service: RewardService, body: NemoGymRequest) -> dict[str, Any]:
    question = "\n".join(content_text(turn.get("content")) for turn in body.conversation_history)
    if body.principle:
        question += f"\nPrinciple: {body.principle}"
    try:
        asked = wire.RankRequest(question=question, responses=[_response_object(item) for item in body.response_objs])
    except ValidationError as error:
        raise wire.RefusedError(f"response_objs: {error.errors()[0]['msg']}") from error
    answer = await service.rank(asked)
    results = [
        {"response_i": i, "response_j": j, "winner": None if one["verdict"] is None else (i, j)[one["verdict"] - 1]}
        for one in answer["comparisons"]
        for i, j in [one["pair"]]
    ]
    metrics = {name: answer[name] for name in ("calls", "ties", "unparsable", "confidence")}
    return {"rewards": answer["rewards"], "comparison_results": results, "metrics": metrics}


def _response_object(item: dict[str, Any]) -> str:
    """The text of a response object of the Responses API, or of a chat message."""
    if "output" in item:
        return "".join(
            content_text(part.get("content")) for part in item["output"] if part.get("type", "message") == "message"
        )
    return content_text(item.get("content"))
