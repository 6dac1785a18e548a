"""The digits data set: real pictures, no leak between splits or from texts, exact balance, and reasonings that hold."""

import hashlib
import json
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from megatron_r1reward.data.preference import read_preferences, read_sft_examples
from megatron_r1reward.data.prompt import POINTWISE_TEMPLATE, split_message_text
from megatron_r1reward.demo.digits import build_digits
from megatron_r1reward.demo.digits_pictures import PictureStore
from megatron_r1reward.demo.digits_text import CATEGORIES, draw_question
from megatron_r1reward.reward.rules import parse_response

SIZES = {"sft_rows": 320, "pool_rows": 160, "heldout_pairs": 160, "judge_rows": 300}
PREFERENCE_FILES = ("sft", "pool", "heldout")
JUDGE_FILES = ("judge_sft", "judge_heldout")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    return out, build_digits(out, seed=3, **SIZES)


def scans():
    """The pictures that it is made of, and what they show."""
    from sklearn.datasets import load_digits

    return load_digits()


def rows_of(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def sources_of(row):
    return [int(part) for part in row["image"].removeprefix("images/").removesuffix(".png").split("-")]


def label_of(row):
    return int(row["answer"][0].removeprefix("<answer>").removesuffix("</answer>"))


def truth(question, digits):
    """The right claim, computed from the true digits alone."""
    place = next((name for name in ("left", "middle", "right") if name in question), None)
    relation = re.search(r"(larger|smaller) than (\d)", question)
    if relation:
        limit = int(relation[2])
        return "yes" if (digits[0] > limit if relation[1] == "larger" else digits[0] < limit) else "no"
    if place:
        return str(digits[{"left": 0, "middle": 1, "right": -1}[place]])
    if "odd" in question:
        return "odd" if digits[0] % 2 else "even"
    if "larger" in question:
        return str(max(digits))
    if "same" in question:
        return "yes" if digits[0] == digits[1] else "no"
    if "sum" in question or "add up" in question:
        return str(sum(digits))
    return "".join(map(str, digits))


def claim_in(response):
    return re.search(r"Yes|No|odd|even|\d+", response)[0].lower()


@pytest.mark.parametrize("name", PREFERENCE_FILES)
def test_labels_agree_with_the_digits_that_the_image_was_made_of(built, name):
    out, _ = built
    labels = scans().target
    for row in rows_of(out, name):
        right = truth(row["question"], [int(labels[index]) for index in sources_of(row)])
        claims = [claim_in(row["response_1"]), claim_in(row["response_2"])]
        assert claims[label_of(row) - 1] == right, row
        assert claims[2 - label_of(row)] != right, row


def test_no_source_picture_is_in_training_and_held_out(built):
    out, summary = built
    used = {name: {index for row in rows_of(out, name) for index in sources_of(row)} for name in PREFERENCE_FILES}
    assert not (used["sft"] | used["pool"]) & used["heldout"]
    assert summary.train_pictures + summary.heldout_pictures == 1797


@pytest.mark.parametrize("name", PREFERENCE_FILES)
def test_labels_are_one_to_one_in_every_category_and_in_random_order(built, name):
    out, summary = built
    rows = rows_of(out, name)
    counts = Counter((row["category"], label_of(row)) for row in rows)
    assert all(counts[category, 1] == counts[category, 2] > 0 for category in CATEGORIES)
    assert summary.rows[name] == len(rows) == sum(summary.categories[name].values())
    labels = [label_of(row) for row in rows]
    assert 0.3 < np.mean([one == other for one, other in pairwise(labels)]) < 0.7


def test_rows_are_distinct_and_images_are_written_once(built):
    out, summary = built
    rows = [row for name in PREFERENCE_FILES for row in rows_of(out, name)]
    keys = {
        (row["image"], row["question"], frozenset(map(claim_in, (row["response_1"], row["response_2"]))))
        for row in rows
    }
    assert len(keys) == len(rows)
    assert {path.name for path in (out / "images").iterdir()} == {row["image"].split("/")[1] for row in rows}
    assert summary.images == len({row["image"] for row in rows})


@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_texts_do_not_reveal_the_right_answer(category):
    """Whatever is told by (question, pair of answers) and by each response's wording: right half of the time."""
    rng = random.Random(0)
    right_is_smaller_text, seen_right, seen_wrong = [], Counter(), Counter()
    for _ in range(4000):
        drawn = draw_question(category, rng)
        right_is_smaller_text.append(drawn.claims[0] < drawn.claims[1])
        wording = [re.sub(r"\d+|odd|even", "_", response) for response in drawn.responses]
        seen_right.update([(drawn.claims[0], wording[0])])
        seen_wrong.update([(drawn.claims[1], wording[1])])
    assert abs(np.mean(right_is_smaller_text) - 0.5) < 0.04  # five standard deviations
    for key in seen_right | seen_wrong:
        total = seen_right[key] + seen_wrong[key]
        assert abs(seen_right[key] - total / 2) <= 5 * (total / 4) ** 0.5 + 1, key


def test_targets_have_the_strict_format_and_state_the_digits_first(built):
    out, _ = built
    labels = scans().target
    lengths = []
    for row in rows_of(out, "sft"):
        match = re.fullmatch(r"<think>(.+)</think><answer>([12])</answer>", row["response"], re.DOTALL)
        assert int(match[2]) == label_of(row)
        says, sees, verdict = match[1].split("\n")
        one, two = re.fullmatch(
            r"The answer (\w+) is in Response 1, the answer (\w+) is in Response 2\.", says
        ).groups()
        assert (one, two) == (claim_in(row["response_1"]), claim_in(row["response_2"]))
        seen, finding = re.fullmatch(r"I see ([\d and]+?)(?:, so (\w+))?\.", sees).groups()
        assert [int(digit) for digit in re.findall(r"\d", seen)] == [int(labels[i]) for i in sources_of(row)]
        right = one if label_of(row) == 1 else two
        assert (finding or seen) == right
        assert verdict == f"The answer {right} is in Response {label_of(row)}."
        lengths.append(len(match[0].split()))
    assert 12 < np.mean(lengths) < 40


def test_a_fallible_annotator_argues_in_good_order_for_the_wrong_response(tmp_path):
    build_digits(tmp_path, seed=5, annotator_error_rate=0.25, **SIZES)
    mistakes = 0
    for row in rows_of(tmp_path, "sft"):
        verdict = int(re.search(r"<answer>([12])</answer>", row["response"])[1])
        claims = [claim_in(row["response_1"]), claim_in(row["response_2"])]
        finding, named = re.search(r"\nThe answer (\w+) is in Response ([12])\.<", row["response"]).groups()
        assert (finding, int(named)) == (claims[verdict - 1], verdict)
        if row["category"] == "digit":
            seen = finding if verdict == label_of(row) else f"{claims[2 - verdict]} or {finding}, so {finding}"
            assert f"I see {seen}.\n" in row["response"]
        mistakes += verdict != label_of(row)
    assert 0.15 < mistakes / SIZES["sft_rows"] < 0.35


def test_the_form_of_a_judge_row_says_nothing_about_its_soundness(built):
    out, _ = built
    two = Counter(row["response"] for row in rows_of(out, "judge_sft") if " and " in row["message"])
    assert 0.35 < two["1"] / two.total() < 0.65


def test_message_column_holds_the_same_prompt_as_the_explicit_columns(built):
    out, _ = built
    for row in rows_of(out, "pool"):
        ((image, text),) = (turn["content"] for turn in json.loads(row["message"]))
        assert image == {"type": "image", "image": row["image"]}
        assert split_message_text(text["text"]) == (row["question"], row["response_1"], row["response_2"])


def test_readers_take_every_file(built):
    out, summary = built
    for name in PREFERENCE_FILES:
        result = read_preferences(out / f"{name}.jsonl")
        assert (len(result.preferences), result.quarantined) == (summary.rows[name], 0)
        assert {preference.metadata["category"] for preference in result.preferences} == set(CATEGORIES)
    for name in ("sft", *JUDGE_FILES):
        assert len(read_sft_examples(out / f"{name}.jsonl").examples) == summary.rows[name]


def test_pictures_are_the_real_digits_enlarged_with_full_contrast(tmp_path):
    store = PictureStore(tmp_path)
    pictures = scans().images
    with Image.open(tmp_path / store.store((5, 17, 200))) as image:
        assert (image.size, image.mode) == ((168, 56), "RGB")
        pixels = np.asarray(image)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert pixels.min() == 0
    assert pixels.max() == 255
    for place, index in enumerate((5, 17, 200)):
        cell = pixels[:, place * 56 : (place + 1) * 56, 0]
        blocks = cell.reshape(8, 7, 8, 7).mean(axis=(1, 3))
        assert np.corrcoef(blocks.ravel(), -pictures[index].ravel())[0, 1] > 0.97


def test_judge_rows_are_right_balanced_and_not_shared(built):
    out, summary = built
    texts = {}
    for name in JUDGE_FILES:
        rows = rows_of(out, name)
        assert Counter(row["response"] for row in rows) == {"0": len(rows) // 2, "1": len(rows) // 2}
        texts[name] = [json.loads(row["message"])[0]["content"] for row in rows]
        for text, row in zip(texts[name], rows, strict=True):
            one, two, finding, named, response, verdict = re.search(
                r"The answer (\w+) is in Response 1, the answer (\w+) is in Response 2\.\n"
                r"I see (?:[\d and]+, so )?(\w+)\.\nThe answer (\w+) is in Response ([12])\."
                r"\n\nVerdict: Response ([12]) is better\.",
                text,
            ).groups()
            supported = finding == named == {"1": one, "2": two}[response] and response == verdict
            assert row["response"] == str(int(supported)), text
    assert not set(texts["judge_sft"]) & set(texts["judge_heldout"])
    assert len(summary.categories["judge_sft"]) == 4


@pytest.mark.slow
def test_same_seed_same_bytes_and_other_seed_other_rows(built, tmp_path):
    def digest(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "quarantine" not in path.name)
        content = b"".join(path.name.encode() + path.read_bytes() for path in files)
        return hashlib.sha256(content).hexdigest()

    out, _ = built
    build_digits(tmp_path / "again", seed=3, **SIZES)
    assert digest(tmp_path / "again") == digest(out)
    build_digits(tmp_path / "other", seed=4, **SIZES)
    assert rows_of(tmp_path / "other", "heldout") != rows_of(out, "heldout")


def test_card_and_meta_tell_what_was_written(built):
    out, summary = built
    card = (out / "README.md").read_text()
    assert "CC BY 4.0" in card
    assert "Optical Recognition of Handwritten Digits" in card
    assert f"Seed {summary.seed}." in card
    counts = summary.categories["heldout"]
    assert f"`heldout.jsonl`: digit {counts['digit']}, larger {counts['larger']}" in card
    meta = json.loads((out / "meta.json").read_text())
    assert meta["rows"] == summary.rows
    assert meta["categories"] == summary.categories


@pytest.mark.parametrize("count", [0, -2, 7])
def test_counts_that_cannot_be_balanced_are_refused(tmp_path, count):
    with pytest.raises(ValueError, match=f"heldout: {count} rows"):
        build_digits(tmp_path, heldout_pairs=count)
    assert not list(tmp_path.iterdir())


def test_more_rows_than_exist_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"heldout: no further different row of category '\w+'"):
        build_digits(tmp_path, sft_rows=2, pool_rows=2, heldout_pairs=20_000, judge_rows=2)


def test_pairs_without_a_better_response_for_training(built, tmp_path):
    """They change no other file, their pictures are the pool's, and the reader takes them as they are."""
    before, _ = built
    summary = build_digits(tmp_path, seed=3, unlabelled_pairs=40, show_progress=False, **SIZES)
    for name in (*PREFERENCE_FILES, *JUDGE_FILES):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (before / f"{name}.jsonl").read_bytes()
    assert "pool_unlabelled" in (tmp_path / "README.md").read_text()
    assert summary.categories["pool_unlabelled"] == {"near-equal": 40, "wrong against wrong": 40}
    read = read_preferences(tmp_path / "pool*.jsonl", unlabelled=True)
    assert read.quarantined == 0
    ours = [one for one in read.preferences if one.label is None]
    assert len(ours) == 80
    assert {one.image_paths for one in ours} <= {one.image_paths for one in read.preferences if one.label is not None}
    labels = scans().target
    for row in rows_of(tmp_path, "pool_unlabelled"):
        right = truth(row["question"], [int(labels[index]) for index in sources_of(row)])
        claims = [claim_in(row["response_1"]), claim_in(row["response_2"])]
        assert claims == [right, right] if row["category"] == "near-equal" else right not in claims, row
    with pytest.raises(ValueError, match="the pool gives fewer than 1000 pairs"):
        build_digits(tmp_path / "more", seed=3, unlabelled_pairs=1000, show_progress=False, **SIZES)


def test_ratings_of_each_response_alone(built, tmp_path):
    """Of the same pairs, with the same bytes in all other files; a reasoning says what it sees and what follows."""
    plain, _ = built
    summary = build_digits(tmp_path, seed=3, pointwise=True, **SIZES)
    for path in plain.glob("*.jsonl"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    rows, pairs = rows_of(tmp_path, "sft_pointwise"), {row["id"]: row for row in rows_of(tmp_path, "sft")}
    assert summary.rows["sft_pointwise"] == len(rows) == 2 * SIZES["sft_rows"]
    for row in rows:
        pair = pairs[row["id"][:-2]]
        number = int(row["id"][-1])
        right = label_of(pair) == number
        assert (row["candidate"], row["image"]) == (pair[f"response_{number}"], pair["image"])
        assert row["rating"] in ((8, 9, 10) if right else (1, 2, 3))
        assert row["reasoning"].endswith(f"so the response is {'right' if right else 'wrong'}.")
    examples = read_sft_examples(tmp_path / "sft_pointwise.jsonl", rated=POINTWISE_TEMPLATE).examples
    assert len(examples) == len(rows)
    assert parse_response(examples[0].response).rating == rows[0]["rating"]
    assert "sft_pointwise.jsonl" in (tmp_path / "README.md").read_text()
