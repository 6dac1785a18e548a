"""The embedded data set: preferences about images of real handwritten digits, small enough for a laptop.

Everything a stage of the pipeline needs comes from one seed: supervised reasonings, a pool for difficulty annotation
and RL, held-out pairs on pictures that training never shows, data for a consistency judge, and rows of best-of-N.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from tqdm import tqdm

from megatron_r1reward.data.prompt import preference_messages
from megatron_r1reward.data.rows import TIE, label_of
from megatron_r1reward.demo.digits_pictures import DigitSources, PictureStore, choose_pictures, split_sources
from megatron_r1reward.demo.digits_text import CATEGORIES, DigitQuestion, draw_question, rated_reasoning, target
from megatron_r1reward.demo.digits_text import judge_rows as make_judge_rows
from megatron_r1reward.evaluation.control_sets import NEAR, WRONG, make_pair_kinds
from megatron_r1reward.files import write_jsonl, write_text
from megatron_r1reward.types import Preference

IMAGE_FOLDER = "images"
_TRIES = 1000
_CARD = """\
# Preferences about handwritten digits

Questions about images of one to three real handwritten digits, each with a right and a wrong response. The two
responses of a row are equally likely given their text: only the image says which one is right.

| file | rows | content |
|---|---|---|
| `sft.jsonl` | {{ rows.sft }} | preferences with a target `response`: reasoning and answer |
| `pool.jsonl` | {{ rows.pool }} | preferences for difficulty annotation and RL |
{% if rows.sft_pointwise is defined %}\
| `sft_pointwise.jsonl` | {{ rows.sft_pointwise }} | each response of `sft.jsonl` alone, with a rating |
{% endif %}\
{% if rows.pool_unlabelled is defined %}\
| `pool_unlabelled.jsonl` | {{ rows.pool_unlabelled }} | two wrong or near-equal responses each, without a label |
{% endif %}\
| `heldout.jsonl` | {{ rows.heldout }} | preferences on source pictures that the two files above never show |
| `judge_sft.jsonl` | {{ rows.judge_sft }} | text only: does a reasoning support a verdict? "1" or "0" |
| `judge_heldout.jsonl` | {{ rows.judge_heldout }} | the same, other texts |

Seed {{ seed }}. {{ images }} images in `images/`, named by their source pictures: training draws on
{{ train_pictures }} pictures, held-out rows on {{ heldout_pictures }} others. Labels are 1:1 in every file, in random
order. No preference repeats another's image, question and pair of answers; the judge's rows may repeat each other.
{% if annotator_error_rate %}
The annotator of `sft.jsonl` is fallible: {{ "%.0f" % (100 * annotator_error_rate) }} % of its reasonings argue for the
wrong response.
{% endif %}
## Rows by category
{% for name, counts in categories.items() %}
`{{ name }}.jsonl`: {% for category, count in counts.items() %}{{ category }} {{ count }}{{ ", " if not loop.last }}\
{% endfor %}.
{% endfor %}
## Source and licence

The digits are those of `sklearn.datasets.load_digits` (1,797 pictures of 8 by 8 pixels), a copy of the test set of
"Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
doi:10.24432/C50P49, under CC BY 4.0. Here each is enlarged to 56 by 56 pixels, black on white, and set beside others;
questions, responses and reasonings are written by a program. Keep this notice with copies.
"""
# Kinds of question that have more than a handful of answers, with the largest number that may be one.
LARGEST_ANSWER = {"digit": 9, "position": 9, "position_of_three": 9, "sum": 18}


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
    pointwise: bool = False,
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
        pointwise: also `sft_pointwise.jsonl`, the cold start of a pointwise model: each response of `sft.jsonl` with a
            sound reasoning and a rating. The other files do not depend on it.

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
    if not pointwise:
        del files["sft_pointwise"]
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
            files["sft_pointwise"] = _rated(files[name], examples, random.Random(f"ratings/{seed}"))
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


def _rated(rows: Sequence[Mapping[str, Any]], examples: Sequence[_Example], rng: random.Random) -> list[dict[str, Any]]:
    """Both responses of each row, one at a time."""
    found = []
    for row, example in zip(rows, examples, strict=True):
        for number in (1, 2):
            lines, rating = rated_reasoning(example.question, right=number == example.label, rng=rng)
            found.append(
                {
                    "id": f"{row['id']}-{number}",
                    "question": row["question"],
                    "candidate": row[f"response_{number}"],
                    "reasoning": "\n".join(lines),
                    "rating": rating,
                    **{key: row[key] for key in ("image", "category", "source")},
                }
            )
    return found


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


def data_card(summary: Mapping[str, Any]) -> str:
    """Markdown text for the fields of a `DigitsSummary`."""
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_CARD).render(summary)


def write_candidates(
    path: Path, *, rows: int, candidates: int = 8, categories: Sequence[str] = ("digit",), seed: int = 0
) -> None:
    """Best-of-N on held-out digits: an image, a question and N different answers of which exactly one is right.

    Writes rows {id, question, responses, images, right, category}; `right` is the index of the right answer.

    Pictures come from the held-out split of `build_digits` with the same seed, and lie beside the file.

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
