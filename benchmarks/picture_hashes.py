"""Which fingerprint of a picture tells "the same, encoded or scaled anew" from "another one".

For each kind of picture: how far a fingerprint moves at most when the picture is saved as JPEG of quality 95, 85 or 50,
or scaled by 2, 0.7 and 0.5, and how near the nearest other picture is. A fingerprint can be used where one threshold
is above the first and below the second for all kinds. Beside the thumbnails of `data.near_duplicates` stand the hashes
of the library ImageHash, of 64 and of 256 bits. Pictures: handwritten digits (scikit-learn's), and pieces of two
photographs that lie next to each other.

    pip install imagehash
    python benchmarks/picture_hashes.py [--digits 400] [--json FILE]
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from PIL import Image
from reporting import print_table, write_json
from sklearn.datasets import load_digits, load_sample_images

from megatron_r1reward.data.near_duplicates import thumbnail

ANEW = ((95, 1.0), (85, 1.0), (50, 1.0), (85, 2.0), (85, 0.7), (85, 0.5))  # (JPEG quality, scale)
PIECE = (120, 140)  # pixels: height, width
Fingerprint = Callable[[Image.Image], np.ndarray]


def thumbnail_levels(picture: Image.Image) -> np.ndarray:
    return np.frombuffer(thumbnail(picture), dtype=np.uint8).astype(np.int16)


def bits(function: Callable[..., Any], size: int) -> Fingerprint:
    return lambda picture: function(picture, size).hash.ravel()


FINGERPRINTS: dict[str, Fingerprint] = {
    "thumbnail, grey levels": thumbnail_levels,
    **{
        f"{function.__name__}, {size**2} bits": bits(function, size)
        for function in (imagehash.average_hash, imagehash.phash, imagehash.dhash, imagehash.whash)
        for size in (8, 16)
    },
}


def digits(count: int) -> list[Image.Image]:
    grey = (load_digits().images[:count] * 255 / 16).astype(np.uint8)
    return [Image.fromarray(one).resize((56, 56), Image.Resampling.BICUBIC).convert("RGB") for one in grey]


def photographs() -> list[Image.Image]:
    height, width = PIECE
    return [
        Image.fromarray(whole[y : y + height, x : x + width])
        for whole in load_sample_images().images
        for y in range(0, whole.shape[0] - height + 1, height)
        for x in range(0, whole.shape[1] - width + 1, width)
    ]


def anew(picture: Image.Image, quality: int, scale: float) -> Image.Image:
    buffer = io.BytesIO()
    picture.resize((round(picture.width * scale), round(picture.height * scale))).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def distances(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Mean difference of grey levels, or how many bits differ; [..., N] for values of shape [..., N, K]."""
    if ours.dtype == bool:
        return (ours != theirs).sum(axis=-1)
    return np.abs(ours - theirs).mean(axis=-1)


def measure(name: str, kinds: dict[str, list[Image.Image]]) -> dict[str, Any]:
    fingerprint = FINGERPRINTS[name]
    row: dict[str, Any] = {"fingerprint": name}
    for kind, pictures in kinds.items():
        values_NK = np.stack([fingerprint(picture) for picture in pictures])
        moved = [distances(values_NK, np.stack([fingerprint(anew(one, *how)) for one in pictures])) for how in ANEW]
        nearest = [np.delete(distances(value_K, values_NK), i).min() for i, value_K in enumerate(values_NK)]
        row |= {f"{kind}: moves by": float(np.max(moved)), f"{kind}: nearest other": float(np.min(nearest))}
    moves, others = ([row[f"{kind}: {what}"] for kind in kinds] for what in ("moves by", "nearest other"))
    return row | {"usable": max(moves) < min(others)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kinds = {"digits": digits(arguments.digits), "photographs": photographs()}
    rows = [measure(name, kinds) for name in FINGERPRINTS]
    print_table(list(rows[0]), rows)
    write_json(arguments.json, "picture_hashes", rows, pictures={kind: len(found) for kind, found in kinds.items()})


if __name__ == "__main__":
    main()
