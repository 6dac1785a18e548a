"""Training data for a small consistency judge: the end of a reasoning, a verdict, and whether it is supported.

A reasoning supports a verdict when it finds one answer, names the response that gives this answer, and the verdict is
that response. Every link is broken in some row: the finding, the response named for it, or the verdict.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from megatron_r1reward.data.prompt import judge_messages
from megatron_r1reward.demo.digits_text import draw_question, reasoning

SUPPORTED = "supported"
CONTRADICTIONS = ("verdict_flipped", "response_flipped", "finding_flipped")
KINDS = (SUPPORTED, *CONTRADICTIONS)
_TRIES = 1000


def judge_rows(
    name: str, count: int, categories: Sequence[str], rng: random.Random, excluded: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """Supervised rows, half of them "1" and half "0" (`count` even), in random order.

    Kinds and categories are drawn independently: the form of a reasoning says nothing about its soundness. Rows may
    repeat, because some categories have few different texts.

    Args:
        name: split name, the beginning of the row ids.
        excluded: messages that must not occur, e.g. those of another split.

    Raises:
        ValueError: all texts of some kind and category are excluded.
    """
    kinds = [SUPPORTED if place % 2 else rng.choice(CONTRADICTIONS) for place in range(count)]
    rng.shuffle(kinds)
    rows = []
    for number, kind in enumerate(kinds):
        category = rng.choice(categories)
        drawn = (_message(kind, category, rng) for _ in range(_TRIES))
        message = next((message for message in drawn if message not in excluded), None)
        if message is None:
            raise ValueError(f"{name}: every row of kind {kind!r} and category {category!r} is excluded")
        response = "1" if kind == SUPPORTED else "0"
        rows.append({"id": f"{name}-{number:05d}", "message": message, "response": response, "category": kind})
    return rows


def _message(kind: str, category: str, rng: random.Random) -> str:
    question = draw_question(category, rng)
    right = rng.choice((1, 2))
    claims = question.claims if right == 1 else (question.claims[1], question.claims[0])
    lines = reasoning(claims, question.digits, question.claims[0], right)
    verdict = right
    if kind == "verdict_flipped":
        verdict = 3 - right
    elif kind == "response_flipped":
        lines[2] = f"The answer {question.claims[0]} is in Response {3 - right}."
        verdict = rng.choice((1, 2))
    elif kind == "finding_flipped":
        lines[2] = f"The answer {question.claims[1]} is in Response {3 - right}."
        verdict = rng.choice((1, 2))
    return json.dumps(judge_messages("\n".join(lines), f"Response {verdict} is better."))
