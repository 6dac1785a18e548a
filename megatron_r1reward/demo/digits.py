"""The embedded data set: preferences about images of real handwritten digits, small enough for a laptop.

Everything a stage of the pipeline needs comes from one seed: supervised reasonings, a pool for difficulty annotation
and RL, held-out pairs on pictures that training never shows, and data for a consistency judge.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_r1reward.data.prompt import preference_messages
from megatron_r1reward.data.rows import TIE, label_of
from megatron_r1reward.demo.digits_card import data_card
from megatron_r1reward.demo.digits_judge import judge_rows as make_judge_rows
from megatron_r1reward.demo.digits_pictures import DigitSources, PictureStore, choose_pictures, split_sources
from megatron_r1reward.demo.digits_text import CATEGORIES, DigitQuestion, draw_question, target
from megatron_r1reward.evaluation.pair_kinds import NEAR, WRONG, make_pair_kinds
from megatron_r1reward.files import write_jsonl, write_text
from megatron_r1reward.types import Preference

IMAGE_FOLDER = "images"
_TRIES = 1000


@dataclass(frozen=True, kw_only=True)
class DigitsSummary:
    """What was written; the content of `meta.json`."""

    seed: int
    annotator_error_rate: float
    rows: Mapping[str, int]  # by file name without suffix
    categories: Mapping[str, Mapping[str, int]]  # rows by file name and category
    images: int
    train_pictures: int  # source pictures available to training, disjoint from the held-out ones
    heldout_pictures: int


@dataclass(frozen=True, kw_only=True)
class _Example:
    """A question, the response that is shown as the right one, and the source pictures of its image."""

    question: DigitQuestion
    label: int
    pictures: tuple[int, ...]


def build_digits(
    out: Path,
    *,
    seed: int = 0,
    sft_rows: int = 8000,
    pool_rows: int = 4000,
    heldout_pairs: int = 480,
    judge_rows: int = 4000,
    categories: Sequence[str] = CATEGORIES,
    annotator_error_rate: float = 0.0,
    unlabelled_pairs: int = 0,
    show_progress: bool = True,
) -> DigitsSummary:
    """Write the data set to `out`; the same arguments give the same bytes. `show_progress` draws a bar on stderr.

    Files: `sft.jsonl` (preferences with a target `response`), `pool.jsonl` and `heldout.jsonl` (preferences),
    `judge_sft.jsonl` and, a tenth of it, `judge_heldout.jsonl` (text only), `images/*.png`, `README.md` (data card)
    and, last, `meta.json`. Labels are exactly 1:1 in every file and category.

    Args:
        categories: kinds of question, evenly spread; a kind named twice gets twice the rows.
        annotator_error_rate: share of the supervised reasonings that argue, in good order, for the wrong response, as
            some of a real annotator's do. The column `answer` stays right.
        unlabelled_pairs: so many pairs of two wrong responses, and as many of two that hardly differ, to items of the
            pool, with the answer "tie": `pool_unlabelled.jsonl`, for RL that rewards agreement. The other files do not
            depend on it.

    Raises:
        ValueError: a count is not a positive even number or exceeds the number of different rows there are, or a
            category is unknown, or the error rate is not a share.
    """
    if not 0.0 <= annotator_error_rate < 1.0:
        raise ValueError(f"annotator_error_rate {annotator_error_rate} is not in [0, 1): give a share")
    unknown = set(categories) - set(CATEGORIES)
    if unknown or not categories:
        raise ValueError(f"categories {sorted(unknown)} are unknown: choose among {', '.join(CATEGORIES)}")
    counts = {"sft": sft_rows, "pool": pool_rows, "heldout": heldout_pairs, "judge_sft": judge_rows}
    for name, count in counts.items():
        if count <= 0 or count % 2:
            raise ValueError(f"{name}: {count} rows cannot be labelled 1:1: give a positive even number")
    train, heldout = split_sources(seed)
    assert not train.indices & heldout.indices, "a source picture is in both splits"

    store = PictureStore(out / IMAGE_FOLDER)
    splits = {"sft": train, "pool": train, "heldout": heldout}
    total = sft_rows + pool_rows + heldout_pairs
    with tqdm(total=total, desc="digits", unit="row", disable=not show_progress, dynamic_ncols=True) as progress:
        files = _preference_files(seed, counts, categories, splits, store, progress, annotator_error_rate)
    files |= _judge_files(judge_rows, categories, seed)
    if unlabelled_pairs:
        files["pool_unlabelled"] = _unlabelled(files["pool"], unlabelled_pairs, seed)

    summary = DigitsSummary(
        seed=seed,
        annotator_error_rate=annotator_error_rate,
        rows={name: len(rows) for name, rows in files.items()},
        categories={
            name: dict(sorted(Counter(row["category"] for row in rows).items())) for name, rows in files.items()
        },
        images=len(store),
        train_pictures=len(train.indices),
        heldout_pictures=len(heldout.indices),
    )
    for name, rows in files.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    write_text(out / "README.md", data_card(asdict(summary)))
    write_text(out / "meta.json", json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def _preference_files(
    seed: int,
    counts: Mapping[str, int],
    categories: Sequence[str],
    splits: Mapping[str, DigitSources],
    store: PictureStore,
    progress: tqdm[Any],
    annotator_error_rate: float,
) -> dict[str, list[dict[str, Any]]]:
    """Rows by file name; their pictures are written to `store`."""
    seen: set[tuple[object, ...]] = set()  # shared, so that the pool repeats nothing of the supervised rows
    files: dict[str, list[dict[str, Any]]] = {}
    for name, sources in splits.items():
        examples = _examples(name, counts[name], categories, sources, random.Random(f"{name}/{seed}"), seen)
        files[name] = []
        for number, example in enumerate(examples):
            files[name].append(_row(f"{name}-{number:05d}", example, store))
            progress.update()
        if name == "sft":
            _add_targets(files[name], examples, annotator_error_rate, random.Random(f"annotator/{seed}"))
    return files


def _examples(
    name: str,
    count: int,
    categories: Sequence[str],
    sources: DigitSources,
    rng: random.Random,
    seen: set[tuple[object, ...]],
) -> list[_Example]:
    """`count` different examples in random order, categories evenly spread, labels 1:1 within each."""
    slots = [(categories[place // 2 % len(categories)], 1 + place % 2) for place in range(count)]
    rng.shuffle(slots)
    examples = []
    for category, label in slots:
        for _ in range(_TRIES):
            question = draw_question(category, rng)
            pictures = choose_pictures(sources, question.digits, rng)
            key = (pictures, question.question, frozenset(question.claims))
            if key not in seen:
                break
        else:
            raise ValueError(f"{name}: no further different row of category {category!r}: ask for fewer rows")
        seen.add(key)
        examples.append(_Example(question=question, label=label, pictures=pictures))
    return examples


def _judge_files(count: int, categories: Sequence[str], seed: int) -> dict[str, list[dict[str, Any]]]:
    """The judge's training rows, and a tenth as many held-out rows that training does not contain."""
    heldout_rng, rng = (random.Random(f"{name}/{seed}") for name in ("judge_heldout", "judge_sft"))
    heldout = make_judge_rows("judge_heldout", max(2, count // 20 * 2), categories, heldout_rng)
    excluded = frozenset(row["message"] for row in heldout)
    return {"judge_sft": make_judge_rows("judge_sft", count, categories, rng, excluded), "judge_heldout": heldout}


def _unlabelled(pool: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of pairs without a better response, made of the pool's."""
    preferences = [
        Preference(
            id=row["id"],
            question=row["question"],
            responses=(row["response_1"], row["response_2"]),
            label=label_of(row["answer"]),
            image_paths=(row["image"],),
            metadata={"category": row["category"]},
        )
        for row in pool
    ]
    made = make_pair_kinds(preferences, count, seed)
    pairs = [(kind, pair) for kind in (WRONG, NEAR) for pair in made[kind]]
    lacking = [kind for kind in (WRONG, NEAR) if len(made[kind]) < count]
    if lacking:
        raise ValueError(f"unlabelled_pairs: the pool gives fewer than {count} pairs {lacking[0]!r}: more pool_rows")
    return [
        {
            "id": f"unlabelled-{number:05d}",
            "question": pair.question,
            "response_1": pair.responses[0],
            "response_2": pair.responses[1],
            "answer": TIE,
            "image": pair.image_paths[0],
            "category": kind,
            "source": "digits",
        }
        for number, (kind, pair) in enumerate(pairs)
    ]


def _add_targets(
    rows: list[dict[str, Any]], examples: Sequence[_Example], error_rate: float, rng: random.Random
) -> None:
    for row, example in zip(rows, examples, strict=True):
        row["response"] = target(example.question, example.label, mistaken=rng.random() < error_rate)


def _row(identifier: str, example: _Example, store: PictureStore) -> dict[str, Any]:
    """A row in the schema of R1-Reward-RL with the explicit columns."""
    question, label = example.question, example.label
    right, wrong = question.responses
    responses = (right, wrong) if label == 1 else (wrong, right)
    image = f"{IMAGE_FOLDER}/{store.store(example.pictures)}"
    messages = preference_messages(question.question, responses, num_images=1)
    messages[0]["content"][0]["image"] = image
    return {
        "id": identifier,
        "message": json.dumps(messages),
        "question": question.question,
        "response_1": responses[0],
        "response_2": responses[1],
        "answer": [f"<answer>{label}</answer>"],
        "image": image,
        "category": question.category,
        "source": "digits",
    }
