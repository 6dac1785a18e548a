"""Best-of-N on held-out digits: an image, a question and N different answers of which exactly one is right."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_r1reward.demo.digits import IMAGE_FOLDER
from megatron_r1reward.demo.digits_pictures import PictureStore, choose_pictures, split_sources
from megatron_r1reward.demo.digits_text import DigitQuestion, draw_question
from megatron_r1reward.files import write_jsonl

# Kinds of question that have more than a handful of answers, with the largest number that may be one.
LARGEST_ANSWER = {"digit": 9, "position": 9, "position_of_three": 9, "sum": 18}


def write_candidates(
    path: Path, *, rows: int, candidates: int = 8, categories: Sequence[str] = ("digit",), seed: int = 0
) -> None:
    """Write rows {id, question, responses, images, right, category}; `right` is the index of the right answer.

    Pictures come from the held-out split of `digits.build_digits` with the same seed, and lie beside the file.

    Raises:
        ValueError: a category has fewer answers than `candidates`.
    """
    unfit = [name for name in categories if LARGEST_ANSWER.get(name, -1) + 1 < candidates]
    if unfit:
        raise ValueError(f"categories {unfit} have fewer than {candidates} answers: use {sorted(LARGEST_ANSWER)}")
    _, heldout = split_sources(seed)
    store, rng = PictureStore(path.parent / IMAGE_FOLDER), random.Random(f"candidates/{seed}")

    def drawn() -> Iterator[dict[str, Any]]:
        for number in range(rows):
            question = draw_question(categories[number % len(categories)], rng)
            responses, right = _answers(question, candidates, rng)
            yield {
                "id": f"candidates-{number:05d}",
                "question": question.question,
                "responses": responses,
                "images": [f"{IMAGE_FOLDER}/{store.store(choose_pictures(heldout, question.digits, rng))}"],
                "right": right,
                "category": question.category,
            }

    write_jsonl(path, drawn())


def _answers(question: DigitQuestion, count: int, rng: random.Random) -> tuple[list[str], int]:
    """Different claims in one of the question's two wordings each, in random order, and where the right one is."""
    wordings = [text.replace(claim, "{}") for text, claim in zip(question.responses, question.claims, strict=True)]
    right = question.claims[0]
    others = [str(value) for value in range(LARGEST_ANSWER[question.category] + 1) if str(value) != right]
    claims = [right, *rng.sample(others, count - 1)]
    rng.shuffle(claims)
    return [rng.choice(wordings).format(claim) for claim in claims], claims.index(right)
