"""Sixty-four clients of a reward service at once, with requests of mixed sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from megatron_r1reward.network.server_api import tls

CLIENTS = 64
Request = tuple[str, dict[str, Any]]  # route and body


def mixed_requests(images: Sequence[str]) -> list[Request]:
    """One per client: pairs, rankings and batches, short and long, with up to two images; every text is another."""
    made: list[Request] = []
    for number, shape in zip(range(CLIENTS), itertools.cycle(range(4)), strict=False):
        words = " ".join(f"word {number}" for _ in range((1, 12, 3, 6)[shape]))
        answers = [f"It is {number} {place}. {words}" for place in range((2, 2, 3, 4)[shape])]
        body = {"question": f"Which, {number}?", "responses": answers, "images": list(images[: shape % 3])}
        if shape == 1:
            made.append(("/v1/batch", {"tasks": [{"compare": body}, {"rank": body | {"schedule": "all_pairs"}}]}))
        else:
            made.append(("/v1/compare" if len(answers) == 2 else "/v1/rank", body))
    return made


def ask_all(
    url: str, requests: Sequence[Request], *, at_once: int, after: Callable[[int], object] = lambda done: None
) -> list[httpx.Response]:
    """Every request by a client of its own, `at_once` of them at a time; `after` is told how many are answered."""

    def ask(request: Request) -> httpx.Response:
        return httpx.post(f"{url}{request[0]}", json=request[1], timeout=600, trust_env=False, verify=tls())

    with ThreadPoolExecutor(at_once) as clients:
        asked = [clients.submit(ask, request) for request in requests]
        for done, _ in enumerate(as_completed(asked), 1):
            after(done)
        return [one.result() for one in asked]


def same(one: Any, other: Any) -> bool:
    """Equal but for the rounding of probabilities, which depends on who else is in a server's batch."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return abs(one - other) < 1e-3 if isinstance(one, float) and isinstance(other, float) else one == other
