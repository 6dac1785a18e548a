"""Rows that say the same about pictures that look the same, however they are written or encoded.

Texts are compared by their letters and digits alone, pictures by grey thumbnails: encoded anew as JPEG of quality 50 to
95, or at another size, a picture of a handwritten digit moves by at most 3.5 of 255 on average; two different ones are
9 apart. Only pictures of about the same brightness are compared with each other.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from megatron_r1reward.types import Preference

_SIDE = 16
_ALIKE = 3.5  # mean difference of grey levels, of 255
Pictures = tuple[bytes, ...]  # thumbnails of a row's pictures, in their order


def thumbnail(image: Image.Image) -> bytes:
    """256 grey levels; the picture's shape is not in it."""
    return image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX).tobytes()


def question_key(preference: Preference) -> bytes:
    """Hash of the letters and digits of the question."""
    return _digest([preference.question])


def pair_key(preference: Preference) -> bytes:
    """Hash of those of the question and of both responses, in any order; the label is not part of it."""
    return _digest([preference.question, *sorted(preference.responses, key=_plain)])


def pictures_of(preference: Preference, thumbnails: Mapping[str, bytes]) -> Pictures:
    return tuple(thumbnails[path] for path in preference.image_paths)


class Seen:
    """Texts with their pictures, as far as they have been added."""

    def __init__(self, entries: Iterable[tuple[bytes, Pictures]] = ()) -> None:
        self._pictures: dict[tuple[bytes, int], list[Pictures]] = {}
        for key, pictures in entries:
            self.add(key, pictures)

    def add(self, key: bytes, pictures: Pictures) -> None:
        self._pictures.setdefault((key, _brightness(pictures)), []).append(pictures)

    def holds(self, key: bytes, pictures: Pictures) -> bool:
        """Whether an entry has the same text and pictures that look like these, in their order."""
        level = _brightness(pictures)
        near = (self._pictures.get((key, other), ()) for other in (level, level - 1, level + 1))
        return any(_alike(pictures, other) for entries in near for other in entries)


def _brightness(pictures: Pictures) -> int:
    """Mean of the first picture, in steps as wide as alike ones may differ: these are one step apart at most."""
    return int(sum(pictures[0]) / len(pictures[0]) / _ALIKE) if pictures else 0


def _alike(ours: Sequence[bytes], theirs: Sequence[bytes]) -> bool:
    if len(ours) != len(theirs):
        return False
    if tuple(ours) == tuple(theirs):
        return True
    first, second = (np.frombuffer(b"".join(part), dtype=np.uint8).astype(np.int16) for part in (ours, theirs))
    distances = np.abs(first - second).reshape(len(ours), -1).mean(axis=1)
    return bool((distances <= _ALIKE).all())


def _digest(texts: Sequence[str]) -> bytes:
    return hashlib.blake2b("\0".join(map(_plain, texts)).encode(), digest_size=16).digest()


def _plain(text: str) -> str:
    """Letters and digits in their compatible form; the text itself where it has none."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if character.isalnum()) or folded
