"""Questions about handwritten digits, a right and a wrong response to each, and the reasoning that tells them apart.

The texts come first and the picture is chosen to fit: a pair of answers is drawn, then a fair coin says which of them
the image will make right. So P(right | text) = 1/2 holds by construction, and only pixels can give the answer away.

Also of these texts: training data for a small consistency judge, the end of a reasoning, a verdict, and whether it is
supported. A reasoning supports a verdict when it finds one answer, names the response that gives this answer, and the
verdict is that response. Every link is broken in some row: the finding, the response named for it, or the verdict.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_r1reward.data.prompt import judge_messages

AnswerT = TypeVar("AnswerT")

PLACES = {"position": ("left", "right"), "position_of_three": ("left", "middle", "right")}
SUPPORTED = "supported"
CONTRADICTIONS = ("verdict_flipped", "response_flipped", "finding_flipped")
_TRIES = 1000


@dataclass(frozen=True, kw_only=True)
class DigitQuestion:
    """A question with its two answers, the right one first, and the digits (left to right) that make it right."""

    category: str
    question: str
    digits: tuple[int, ...]
    claims: tuple[str, str]  # what the answers say, in a word, e.g. ("7", "3") or ("yes", "no")
    responses: tuple[str, str]  # the claims as sentences


def reasoning(claims: tuple[str, str], digits: tuple[int, ...], finding: str, better: int) -> list[str]:
    """Three lines: what each response says, what is seen and what follows from it, and which response says that.

    `claims` are in the order shown. A sound reasoning has `claims[better - 1] == finding`.
    """
    follows = "" if finding == str(digits[0]) and len(digits) == 1 else f", so {finding}"
    return [
        f"The answer {claims[0]} is in Response 1, the answer {claims[1]} is in Response 2.",
        f"I see {' and '.join(map(str, digits))}{follows}.",
        f"The answer {finding} is in Response {better}.",
    ]


def target(question: DigitQuestion, label: int, *, mistaken: bool = False) -> str:
    """The response to learn where response `label` is the right one, in the strict format of the published model.

    `mistaken` is an annotator's error: the reasoning decides for the wrong response, wavering ("I see 8 or 3, so 3.")
    where it would contradict what it sees.
    """
    right, wrong = question.claims
    claims = (right, wrong) if label == 1 else (wrong, right)
    finding, verdict = (wrong, 3 - label) if mistaken else (right, label)
    lines = reasoning(claims, question.digits, finding, verdict)
    if mistaken and lines[1] == f"I see {right}, so {wrong}.":
        lines[1] = f"I see {right} or {wrong}, so {wrong}."
    return "<think>" + "\n".join(lines) + f"</think><answer>{verdict}</answer>"


def rated_reasoning(question: DigitQuestion, *, right: bool, rng: random.Random) -> tuple[list[str], int]:
    """What leads to the rating of the right or the wrong response alone, and the rating: 8 to 10 or 1 to 3, drawn as if
    by annotators who agree on what is right, not on a number."""
    claim, finding = question.claims[0 if right else 1], question.claims[0]
    lines = [
        f"The response says {claim}.",
        reasoning(question.claims, question.digits, finding, 1)[1],
        f"The answer is {finding}, so the response is {'right' if right else 'wrong'}.",
    ]
    return lines, rng.choice((8, 9, 10) if right else (1, 2, 3))


def draw_question(category: str, rng: random.Random) -> DigitQuestion:
    """A random question of one of `CATEGORIES`."""
    return _DRAWERS[category](rng)


def _two(rng: random.Random, low: int, high: int) -> tuple[int, int]:
    """Two different integers in [low, high] in random order; the first will be right."""
    first, second = rng.sample(range(low, high + 1), 2)
    return first, second


def _shuffled(rng: random.Random, pair: tuple[AnswerT, AnswerT]) -> tuple[AnswerT, AnswerT]:
    first, second = pair
    return (first, second) if rng.random() < 0.5 else (second, first)


def _phrase(rng: random.Random, claims: tuple[str, str], *templates: str) -> tuple[str, str]:
    """Each claim as a sentence, independently worded, so that the wording tells nothing."""
    return rng.choice(templates).format(claims[0]), rng.choice(templates).format(claims[1])


def _yes_no(rng: random.Random, yes_is_right: bool, yes: str, no: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Claims and responses of a yes/no question, the right ones first."""
    answers = [("yes", rng.choice(("Yes, {}.", "Yes. I see that {}.")).format(yes))]
    answers.append(("no", rng.choice(("No, {}.", "No. I see that {}.")).format(no)))
    right, wrong = answers if yes_is_right else reversed(answers)
    return (right[0], wrong[0]), (right[1], wrong[1])


def _digit(rng: random.Random) -> DigitQuestion:
    right, wrong = _two(rng, 0, 9)
    claims = (str(right), str(wrong))
    return DigitQuestion(
        category="digit",
        question=rng.choice(("Which digit does the image show?", "What is the digit in the image?")),
        digits=(right,),
        claims=claims,
        responses=_phrase(rng, claims, "The digit is {}.", "The image shows {}."),
    )


def _parity(rng: random.Random) -> DigitQuestion:
    digit = rng.randrange(10)
    claims = ("odd", "even") if digit % 2 else ("even", "odd")
    questions = ("Is the digit even or odd?", "Is the digit odd or even?", "Is this digit an even or an odd number?")
    return DigitQuestion(
        category="parity",
        question=rng.choice(questions),
        digits=(digit,),
        claims=claims,
        responses=_phrase(rng, claims, "The digit is {}.", "It is an {} number."),
    )


def _position(rng: random.Random, category: str = "position") -> DigitQuestion:
    right, wrong = _two(rng, 0, 9)
    names = PLACES[category]
    asked = rng.randrange(len(names))
    digits = [rng.randrange(10) for _ in names]
    if rng.random() < 0.5:  # the wrong answer stands elsewhere in the image, so that the place matters
        digits[rng.choice([place for place in range(len(names)) if place != asked])] = wrong
    digits[asked] = right
    place = "in the middle" if names[asked] == "middle" else f"on the {names[asked]}"
    claims = (str(right), str(wrong))
    return DigitQuestion(
        category=category,
        question=rng.choice((f"Which digit is {place}?", f"What is the digit {place} of the image?")),
        digits=tuple(digits),
        claims=claims,
        responses=_phrase(rng, claims, f"The digit {place} is {{}}.", "It is {}."),
    )


def _larger(rng: random.Random) -> DigitQuestion:
    right, wrong = _two(rng, 1, 9)
    # The wrong answer is the smaller digit of the image where it can be, half of the time.
    other = wrong if wrong < right and rng.random() < 0.5 else rng.randrange(right)
    claims = (str(right), str(wrong))
    return DigitQuestion(
        category="larger",
        question=rng.choice(("Which of the two digits is larger?", "What is the larger of the two digits?")),
        digits=_shuffled(rng, (right, other)),
        claims=claims,
        responses=_phrase(rng, claims, "The larger digit is {}.", "It is {}."),
    )


def _same(rng: random.Random) -> DigitQuestion:
    same = rng.random() < 0.5
    first, second = _two(rng, 0, 9)
    claims, responses = _yes_no(rng, same, "the two digits are the same", "the two digits are different")
    return DigitQuestion(
        category="same",
        question=rng.choice(("Are the two digits the same?", "Does the image show the same digit twice?")),
        digits=(first, first if same else second),
        claims=claims,
        responses=responses,
    )


def _sum(rng: random.Random) -> DigitQuestion:
    base = rng.randrange(10) + rng.randrange(10)
    near = rng.choice([total for total in range(max(0, base - 3), min(18, base + 3) + 1) if total != base])
    right, wrong = _shuffled(rng, (base, near))
    first = rng.randint(max(0, right - 9), min(9, right))
    claims = (str(right), str(wrong))
    return DigitQuestion(
        category="sum",
        question=rng.choice(("What is the sum of the two digits?", "What do the two digits add up to?")),
        digits=(first, right - first),
        claims=claims,
        responses=_phrase(rng, claims, "The sum is {}.", "They add up to {}."),
    )


def _threshold(rng: random.Random) -> DigitQuestion:
    limit, relation, holds = rng.randint(1, 8), rng.choice(("larger", "smaller")), rng.random() < 0.5
    fits = {"larger": range(limit + 1, 10), "smaller": range(limit)}[relation]
    digit = rng.choice([candidate for candidate in range(10) if (candidate in fits) == holds])
    statement = f"{relation} than {limit}"
    claims, responses = _yes_no(rng, holds, f"it is {statement}", f"it is not {statement}")
    return DigitQuestion(
        category="threshold",
        question=rng.choice((f"Is the digit {statement}?", f"Does the image show a digit {statement}?")),
        digits=(digit,),
        claims=claims,
        responses=responses,
    )


def _number(rng: random.Random) -> DigitQuestion:
    digits = [rng.randrange(10) for _ in range(rng.choice((2, 3)))]
    place = rng.randrange(len(digits))
    changed = list(digits)
    changed[place] = (digits[place] + rng.randint(1, 9)) % 10
    right, wrong = _shuffled(rng, (tuple(digits), tuple(changed)))
    claims = ("".join(map(str, right)), "".join(map(str, wrong)))
    return DigitQuestion(
        category="number",
        question=rng.choice(("Which number do the digits form?", "Read the number in the image.")),
        digits=right,
        claims=claims,
        responses=_phrase(rng, claims, "The number is {}.", "It reads {}."),
    )


_DRAWERS: dict[str, Callable[[random.Random], DigitQuestion]] = {
    "digit": _digit,
    "parity": _parity,
    "threshold": _threshold,
    "position": _position,
    "position_of_three": lambda rng: _position(rng, "position_of_three"),
    "larger": _larger,
    "same": _same,
    "sum": _sum,
    "number": _number,
}
CATEGORIES = tuple(_DRAWERS)


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
