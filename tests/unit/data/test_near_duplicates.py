"""What says the same about the same picture is found whatever its form; what differs by a digit or a stroke is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from megatron_r1reward.data.near_duplicates import (
    Seen,
    near_keys,
    one_word_apart,
    pair_key,
    question_key,
    thumbnail,
)
from megatron_r1reward.types import Preference


def row(question: str, first: str = "a", second: str = "b", label: int = 1) -> Preference:
    return Preference(id="x", question=question, responses=(first, second), label=label, image_paths=())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    from sklearn.datasets import load_digits

    grey = (load_digits().images[:200] * 255 / 16).astype(np.uint8)
    return [Image.fromarray(one).resize((56, 56), Image.Resampling.BICUBIC).convert("RGB") for one in grey]


def again(image: Image.Image, quality: int, size: tuple[int, int]) -> Image.Image:
    buffer = io.BytesIO()
    image.resize(size).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


@pytest.mark.parametrize(("quality", "size"), [(95, (56, 56)), (50, (56, 56)), (85, (112, 112)), (85, (28, 28))])
def test_a_picture_encoded_anew_is_found(pictures: list[Image.Image], quality: int, size: tuple[int, int]) -> None:
    seen = Seen((b"q", (thumbnail(image),)) for image in pictures)
    assert all(seen.holds(b"q", (thumbnail(again(image, quality, size)),)) for image in pictures)


def test_another_picture_another_number_of_them_or_another_order_is_not(pictures: list[Image.Image]) -> None:
    thumbnails = [thumbnail(image) for image in pictures]
    for place, one in enumerate(thumbnails[:50]):
        others = Seen((b"q", (other,)) for other in thumbnails[:place] + thumbnails[place + 1 :])
        assert not others.holds(b"q", (one,))
    seen = Seen([(b"q", (thumbnails[0], thumbnails[1]))])
    assert seen.holds(b"q", (thumbnails[0], thumbnails[1]))
    assert not seen.holds(b"q", (thumbnails[1], thumbnails[0]))
    assert not seen.holds(b"q", (thumbnails[0],))
    assert not seen.holds(b"other", (thumbnails[0], thumbnails[1]))


def test_texts_are_their_letters_and_digits() -> None:
    assert question_key(row("Which  digit?")) == question_key(row("which digit \uff1f"))
    assert question_key(row("Is it 7?")) != question_key(row("Is it 1?"))
    assert question_key(row("?")) != question_key(row("!"))
    assert pair_key(row("q", "It is 7.", "It is 3.")) == pair_key(row("q", "it is 3", "It is 7!", label=2))
    assert pair_key(row("q", "It is 7.", "It is 3.")) != pair_key(row("q", "It is 7.", "It is 8."))
    assert pair_key(row("\u54ea\u4e2a\u6570\u5b57", "\u4e03")) != pair_key(row("\u54ea\u4e2a\u6570", "\u4e03"))


LONG = ["The", "red", "car", "on", "the", "left", "stands", "beside", "an", "old", "tree", "near", "the", "river"]


@pytest.mark.parametrize("place", range(len(LONG)))
def test_texts_that_differ_by_one_word_are_found_wherever_it_is(place: int) -> None:
    text = " ".join(LONG)
    changes = {
        "replaced": [*LONG[:place], "blue", *LONG[place + 1 :]],
        "left out": LONG[:place] + LONG[place + 1 :],
        "added": [*LONG[:place], "really", *LONG[place:]],
    }
    for name, words in changes.items():
        changed = " ".join(words).upper() + "!"
        for ours, theirs in (
            (row("q", text, "no"), row("Q?", "No.", changed)),  # in a response, in the other order
            (row(text, "yes", "no"), row(changed, "no", "yes")),
        ):
            assert one_word_apart(ours, theirs), name
            assert one_word_apart(theirs, ours), name
            assert set(near_keys(ours)) & set(near_keys(theirs)), name


def test_what_says_something_else_is_not_one_word_apart() -> None:
    text = " ".join(LONG)
    other = text.replace("red", "blue").replace("old", "tall")
    assert not one_word_apart(row("q", text, "no"), row("q", other, "no")), "two words"
    assert not one_word_apart(row("q", text, "no"), row("q?", text.replace("red", "blue"), "yes")), "two texts"
    assert not one_word_apart(row("q", text, "no"), row("q", text, "no")), "a repeat is another thing"
    assert not one_word_apart(row("q", f"{text} 7", "no"), row("q", f"{text} 8", "no")), "a number"
    assert not one_word_apart(row("q", "It is a cat", "no"), row("q", "It is a dog", "no")), "a short answer"
    chinese = "\u8fd9\u8f86\u7ea2\u8272\u7684\u6c7d\u8f66\u505c\u5728\u6811\u65c1\u8fb9"  # written without spaces
    assert one_word_apart(row("q", chinese, "no"), row("q", chinese.replace("\u7ea2", "\u84dd"), "no"))
