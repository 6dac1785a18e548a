"""What says the same about the same picture is found whatever its form; what differs by a digit or a stroke is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from megatron_r1reward.data.near_duplicates import Seen, pair_key, question_key, thumbnail
from megatron_r1reward.types import Preference


def row(question: str, first: str = "a", second: str = "b", label: int = 1) -> Preference:
    return Preference(id="x", question=question, responses=(first, second), label=label, image_paths=())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    grey = (load_digits().images[:200] * 255 / 16).astype(np.uint8)
    return [Image.fromarray(one).resize((56, 56), Image.Resampling.BICUBIC).convert("RGB") for one in grey]


def again(image: Image.Image, quality: int, size: tuple[int, int]) -> Image.Image:
    buffer = io.BytesIO()
    image.resize(size).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


@pytest.mark.parametrize(("quality", "size"), [(95, (56, 56)), (50, (56, 56)), (85, (112, 112)), (85, (40, 40))])
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
