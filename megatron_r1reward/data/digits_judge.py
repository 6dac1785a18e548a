"""Training data for a small consistency judge: the end of a reasoning, a verdict, and whether it is supported.

A reasoning supports a verdict when it calls exactly that response right and concludes the same. Every way to break this
is drawn: the verdict, the concluding line, or the assessment of the responses.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from megatron_r1reward.data.digits_text import DigitQuestion, assessment, draw_question, reasoning
from megatron_r1reward.data.prompt import judge_messages

SUPPORTED = "supported"
# A drawer gets the response that is right and returns: (is 1 right, is 2 right), the conclusion, the verdict.
_Outcome = tuple[tuple[bool, bool], int, int]
_CONTRADICTIONS: dict[str, Callable[[int, random.Random], _Outcome]] = {
    "verdict_flipped": lambda right, rng: ((right == 1, right == 2), right, 3 - right),
    "conclusion_flipped": lambda right, rng: ((right == 1, right == 2), 3 - right, rng.choice((1, 2))),
    "undecided": lambda right, rng: (rng.choice(((True, True), (False, False))), right, rng.choice((1, 2))),
}
KINDS = (SUPPORTED, *_CONTRADICTIONS)
_TRIES = 1000


def judge_rows(
    name: str, count: int, categories: Sequence[str], rng: random.Random, seen: set[str]
) -> list[dict[str, Any]]:
    """Supervised rows, half of them "1" and half "0" (`count` even), in random order.

    Args:
        name: split name, the beginning of the row ids.
        seen: messages that must not occur again; extended with the new ones.

    Raises:
        ValueError: there are not `count` further rows.
    """
    kinds = [SUPPORTED if place % 2 else rng.choice(list(_CONTRADICTIONS)) for place in range(count)]
    rng.shuffle(kinds)
    rows = []
    for number, kind in enumerate(kinds):
        message = next(
            (drawn for drawn in (_message(kind, categories, rng) for _ in range(_TRIES)) if drawn not in seen), None
        )
        if message is None:
            raise ValueError(f"{name}: no further judge row of kind {kind!r} after {len(seen)}: ask for fewer rows")
        seen.add(message)
        response = "1" if kind == SUPPORTED else "0"
        rows.append({"id": f"{name}-{number:05d}", "message": message, "response": response, "category": kind})
    return rows


def _message(kind: str, categories: Sequence[str], rng: random.Random) -> str:
    question = draw_question(rng.choice(categories), rng)
    right = rng.choice((1, 2))
    if kind == SUPPORTED:
        is_right, conclusion, verdict = (right == 1, right == 2), right, right
    else:
        is_right, conclusion, verdict = _CONTRADICTIONS[kind](right, rng)
    lines = assessment(_claims(question, right), is_right, conclusion)
    if rng.random() < 0.25:  # a short reasoning, or a judge set to read more lines, shows what precedes them
        lines = reasoning(question, right)[: -len(lines)] + lines
    return json.dumps(judge_messages("\n".join(lines), f"Response {verdict} is better."))


def _claims(question: DigitQuestion, right: int) -> tuple[str, str]:
    first, second = question.claims
    return (first, second) if right == 1 else (second, first)
