"""Rows that say the same about pictures that look the same, however they are written or encoded.

Texts are compared by their letters and digits alone, pictures by grey thumbnails: encoded anew as JPEG of quality 50 to
95, or at half or double size, a picture of a handwritten digit moves by at most 5.2 of 255 on average; two different
ones are 9 apart, and no hash of the library ImageHash tells them apart that well (`benchmarks/picture_hashes.py`). Only
pictures of about the same brightness are compared with each other.

Two pairs are one word apart when a word is replaced, left out or added in one of their three texts, which has at least
eight words, and no number changes. Such pairs share one of their `near_keys`: the other two texts, and the beginning or
the end of this one.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from megatron_r1reward.types import Preference

_SIDE = 16
_ALIKE = 5.5  # mean difference of grey levels, of 255
_FEWEST_WORDS = 8  # in shorter texts one word is the answer
_ALPHANUMERIC = re.compile(r"[^\W_]+")
# A character of a script that is written without spaces is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
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


def near_keys(preference: Preference) -> tuple[int, ...]:
    """64 bits each, up to twelve; two pairs that are one word apart have one in common."""
    texts = (preference.question, *preference.responses)
    question, first, second = map(_plain, texts)
    others_of = (
        ("question", *sorted((first, second))),
        ("response", question, second),
        ("response", question, first),
    )
    found = []
    for text, others in zip(texts, others_of, strict=True):
        words = _words(text)
        if len(words) < _FEWEST_WORDS - 1:  # one more of them may be enough
            continue
        same = short_key("\0".join([*others, str(len(preference.image_paths))]))
        for half in {(len(words) - 1) // 2, len(words) // 2}:
            found += [short_key(f"{same} begins {words[:half]}"), short_key(f"{same} ends {words[-half:]}")]
    return tuple(found)


def one_word_apart(ours: Preference, theirs: Preference) -> bool:
    """Whether the texts differ so; pictures and labels are not looked at."""
    responses = theirs.responses
    for one, other in (responses, responses[::-1]):
        pairs = ((ours.question, theirs.question), (ours.responses[0], one), (ours.responses[1], other))
        different = [pair for pair in pairs if _plain(pair[0]) != _plain(pair[1])]
        if len(different) == 1 and _one_word(*map(_words, different[0])):
            return True
    return False


def _one_word(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    longest = max(len(ours), len(theirs))
    if longest < _FEWEST_WORDS or _numbers(ours) != _numbers(theirs):
        return False
    shortest = min(len(ours), len(theirs))
    begins = next((n for n in range(shortest) if ours[n] != theirs[n]), shortest)
    ends = next((n for n in range(shortest - begins) if ours[-1 - n] != theirs[-1 - n]), shortest - begins)
    return longest - begins - ends <= 1


def _numbers(words: Sequence[str]) -> list[str]:
    return [word for word in words if any(map(str.isdigit, word))]


def short_key(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def pictures_of(preference: Preference, thumbnails: Mapping[str, bytes]) -> Pictures:
    return tuple(thumbnails[path] for path in preference.image_paths)


class Seen:
    """Texts with their pictures, as far as they have been added."""

    def __init__(self, entries: Iterable[tuple[bytes, Pictures]] = ()) -> None:
        self._pictures: dict[tuple[bytes, int, int], list[bytes]] = {}
        for key, pictures in entries:
            self.add(key, pictures)

    def add(self, key: bytes, pictures: Pictures) -> None:
        self._pictures.setdefault((key, len(pictures), _brightness(pictures)), []).append(b"".join(pictures))

    def holds(self, key: bytes, pictures: Pictures) -> bool:
        """Whether an entry has the same text and pictures that look like these, in their order."""
        level = _brightness(pictures)
        near = (self._pictures.get((key, len(pictures), other), ()) for other in (level, level - 1, level + 1))
        return any(bool(entries) and _any_alike(b"".join(pictures), entries) for entries in near)


def looks_alike(ours: Pictures, theirs: Pictures) -> bool:
    """Whether rows have pictures that look the same, in their order."""
    return len(ours) == len(theirs) and _any_alike(b"".join(ours), [b"".join(theirs)])


def _brightness(pictures: Pictures) -> int:
    """Mean of the first picture, in steps as wide as alike ones may differ: these are one step apart at most."""
    return int(sum(pictures[0]) / len(pictures[0]) / _ALIKE) if pictures else 0


def _any_alike(ours: bytes, entries: Sequence[bytes]) -> bool:
    """Of entries with as many pictures."""
    if not ours:
        return True
    shape = (-1, len(ours) // _SIDE**2, _SIDE**2)
    mine, theirs = (
        np.frombuffer(part, dtype=np.uint8).reshape(shape).astype(np.int16) for part in (ours, b"".join(entries))
    )
    distances = np.abs(mine - theirs).mean(axis=2)  # [entries, pictures]
    return bool((distances <= _ALIKE).all(axis=1).any())


def _digest(texts: Sequence[str]) -> bytes:
    return hashlib.blake2b("\0".join(map(_plain, texts)).encode(), digest_size=16).digest()


def _plain(text: str) -> str:
    """Letters and digits in their compatible form; the text itself where it has none."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(_ALPHANUMERIC.findall(folded)) or folded


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
