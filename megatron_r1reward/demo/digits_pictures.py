"""The 1,797 real handwritten digits that scikit-learn ships: split by picture, enlarged, set side by side, stored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_r1reward.files import atomic_path

CELL_PIXELS = 56  # one digit: 4 by 4 patches of 14 pixels, i.e. 2 by 2 merged tokens of the vision tower
FULL_INK = 16  # largest value in the 8 by 8 source pictures
HELDOUT_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class DigitSources:
    """Source pictures of one split: `by_digit[d]` are the indices of the pictures that show digit d."""

    by_digit: tuple[tuple[int, ...], ...]

    @property
    def indices(self) -> frozenset[int]:
        return frozenset(index for pictures in self.by_digit for index in pictures)


def _scans() -> Any:
    from sklearn.datasets import load_digits  # takes seconds, and only who makes the data needs it

    return load_digits()


def split_sources(seed: int) -> tuple[DigitSources, DigitSources]:
    """Training and held-out pictures: disjoint, with the same share of every digit held out."""
    labels = _scans().target
    rng = random.Random(f"sources/{seed}")
    train, heldout = [], []
    for digit in range(10):
        pictures = np.flatnonzero(labels == digit).tolist()
        rng.shuffle(pictures)
        cut = round(HELDOUT_SHARE * len(pictures))
        heldout.append(tuple(sorted(pictures[:cut])))
        train.append(tuple(sorted(pictures[cut:])))
    return DigitSources(by_digit=tuple(train)), DigitSources(by_digit=tuple(heldout))


def choose_pictures(sources: DigitSources, digits: Sequence[int], rng: random.Random) -> tuple[int, ...]:
    """A random picture of every digit; no picture twice, so that equal digits are still two handwritings."""
    chosen: list[int] = []
    for digit in digits:
        chosen.append(rng.choice([index for index in sources.by_digit[digit] if index not in chosen]))
    return tuple(chosen)


class PictureStore:
    """Composes rows of digits and writes each composition once, as PNG under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pictures = _scans().images  # float64 [1797, 8, 8], ink from 0 to FULL_INK
        self._stored: set[str] = set()

    def __len__(self) -> int:
        return len(self._stored)

    def store(self, indices: Sequence[int]) -> str:
        """File name of the composition of these source pictures, from left to right."""
        name = "-".join(f"{index:04d}" for index in indices) + ".png"
        if name not in self._stored:
            with atomic_path(self._folder / name) as temporary:
                self.compose(indices).save(temporary, compress_level=1)  # time matters more than a tenth in size
            self._stored.add(name)
        return name

    def compose(self, indices: Sequence[int]) -> Image.Image:
        """RGB image of CELL_PIXELS height and CELL_PIXELS per digit width, black ink on white."""
        image = Image.new("L", (CELL_PIXELS * len(indices), CELL_PIXELS))
        for place, index in enumerate(indices):
            brightness = 255 - np.rint(self._pictures[index] * (255 / FULL_INK))
            cell = Image.fromarray(brightness.astype(np.uint8))
            image.paste(cell.resize((CELL_PIXELS, CELL_PIXELS), Image.Resampling.BICUBIC), (place * CELL_PIXELS, 0))
        return image.convert("RGB")
