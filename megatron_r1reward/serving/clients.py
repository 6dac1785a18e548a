"""Reward functions for trainers that call one: TRL and verl. Needs httpx alone, and a running `r1reward serve`.

from megatron_r1reward.serving.clients import TrlReward          # GRPOTrainer(reward_funcs=[TrlReward(URL)])
reward.custom_reward_function.path=.../serving/clients.py        # verl; .name=compute_score, R1REWARD_URL set
"""

from __future__ import annotations

import base64
import io
import logging
import os
import ssl
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import httpx

log = logging.getLogger(__name__)
NEUTRAL = 0.5
URL_VARIABLE, TOKEN_VARIABLE = "R1REWARD_URL", "R1REWARD_SERVE_TOKEN"


@cache
def _tls() -> ssl.SSLContext:
    """The machine's certificates: a client for each sample that read them again would take longer than its request."""
    return ssl.create_default_context()


class RewardServiceError(RuntimeError):
    """The service gave no rewards."""


class TrlReward:
    """A reward function for TRL's GRPOTrainer: the completions of one prompt, which stand together, are ranked.

    Args:
        url: of `r1reward serve`.
        images: column of the data set with an image or a list of images per row (PIL images, paths under the service's
            roots, or data URLs); None: text only.
        on_failure: "neutral" gives 0.5 to a group that got no rewards, counted in `counts` and logged; "raise" ends
            the training step.
        retries: further attempts of a busy (429) or unready (503) service.
    """

    __name__ = "r1_reward"  # the name under which TRL logs the reward

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        images: str | None = "images",
        votes: int = 1,
        on_failure: Literal["neutral", "raise"] = "raise",
        retries: int = 20,
        timeout_s: float = 600.0,
    ) -> None:
        self._url, self._images, self._votes = url.rstrip("/"), images, votes
        self._on_failure, self._retries = on_failure, retries
        token = token or os.environ.get(TOKEN_VARIABLE)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=timeout_s, trust_env=False
        )
        self.counts: Counter[str] = Counter()  # groups, failed

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One reward per completion: in (0, 1), or of a scalar reward model any number."""
        pictures = columns.get(self._images) if self._images else None
        rewards: list[float] = []
        start = 0
        while start < len(prompts):
            end = start + 1
            while end < len(prompts) and prompts[end] == prompts[start]:
                end += 1
            images = _image_list(pictures[start]) if pictures is not None else []
            rewards += self._group(_text(prompts[start]), [_text(item) for item in completions[start:end]], images)
            start = end
        return rewards

    def _group(self, question: str, responses: list[str], images: list[str]) -> list[float]:
        self.counts["groups"] += 1
        try:
            body = {"question": question, "responses": responses, "images": images, "votes": self._votes}
            return post(self._http, f"{self._url}/v1/score", body, retries=self._retries)["rewards"]
        except RewardServiceError as error:
            if self._on_failure == "raise":
                raise
            self.counts["failed"] += 1
            log.warning("no rewards for a group of %d (neutral): %s", len(responses), error)
            return [NEUTRAL] * len(responses)


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    on_failure: Literal["neutral", "raise"] = "raise",
) -> float | dict[str, float]:
    """verl's custom reward function: one sample at a time; the service gathers the samples of one question.

    `extra_info["question"]` is the question (verl's data sets carry it), `extra_info["images"]` its images as paths
    under the service's roots or data URLs.

    Args:
        on_failure: set by `reward.custom_reward_function.reward_kwargs`. "neutral" gives 0.5 to a sample that got no
            reward; every score then comes with `r1_reward_failed`, 0 or 1, whose mean verl reports among its metrics.

    Raises:
        RewardServiceError: no question, or, by "raise", no reward.
    """
    information = extra_info or {}
    if not isinstance(information.get("question"), str):
        raise RewardServiceError('extra_info has no "question": add the column, the samples of one question are ranked')
    if on_failure == "raise":
        return await _one_score(solution_str, information)
    try:
        return {"score": await _one_score(solution_str, information), "r1_reward_failed": 0.0}
    except RewardServiceError as error:
        log.warning("no reward for a sample (neutral): %s", error)
        return {"score": NEUTRAL, "r1_reward_failed": 1.0}


async def _one_score(solution_str: str, information: dict[str, Any]) -> float:
    token = os.environ.get(TOKEN_VARIABLE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    body = {
        "prompt": information["question"],
        "response": solution_str,
        "images": _image_list(information.get("images") or []),
    }
    async with httpx.AsyncClient(headers=headers, timeout=600.0, trust_env=False, verify=_tls()) as http:
        try:
            answer = await http.post(f"{os.environ.get(URL_VARIABLE, 'http://127.0.0.1:8080')}/slime", json=body)
        except httpx.TransportError as error:
            raise RewardServiceError(f"{URL_VARIABLE}: {type(error).__name__} {error}") from error
    if not answer.is_success:
        raise RewardServiceError(f"the service answered {answer.status_code}: {answer.text[:300]}")
    return float(answer.json())


def post(http: httpx.Client, url: str, body: dict[str, Any], *, retries: int) -> Any:
    """POST; a service that is busy or unready is asked again when it says.

    Raises:
        RewardServiceError: it cannot be reached, refuses, or stays busy.
    """
    for attempt in range(retries + 1):
        try:
            answer = http.post(url, json=body)
        except httpx.TransportError as error:
            raise RewardServiceError(f"{url}: {type(error).__name__} {error}") from error
        if answer.is_success:
            return answer.json()
        if answer.status_code not in (429, 503) or attempt == retries:
            raise RewardServiceError(f"{url} answered {answer.status_code}: {answer.text[:300]}")
        time.sleep(float(answer.headers.get("Retry-After", "1")))
    raise AssertionError("the last attempt returns or raises")


def _text(value: Any) -> str:
    """Plain text, or the text of a conversation in TRL's form."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return _text(value.get("content") or value.get("text") or "")
    return "\n".join(filter(None, (_text(part) for part in value or [])))


def _image_list(value: Any) -> list[str]:
    return [_image(item) for item in (value if isinstance(value, list | tuple) else [value])]


def _image(value: Any) -> str:
    if isinstance(value, str):
        return value
    buffer = io.BytesIO()
    value.save(buffer, format="PNG")  # a PIL image
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
