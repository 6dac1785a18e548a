"""Videos are lists of images: frames, evenly spaced from the first to the last, at most `data.max_frames` of each.

A row names a folder of frames (in the order of their names), a list of frames, or a video file, in `video` or `videos`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_r1reward.data.rows import RowError
from megatron_r1reward.files import write_bytes

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg")
_FEWEST = 2  # the processors read a video in pairs of frames; a single one is a picture


def frames_of(fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What a row's `video` or `videos` name, for `MediaResolver`: one entry per video; None where it has none.

    A list under `video` are the frames of one video; under `videos` each entry is a video.
    """
    video, videos = fields.get("video"), fields.get("videos")
    if video:
        return [{"frames": video}]
    if videos:
        return [{"frames": one} for one in (videos if isinstance(videos, list) else [videos])]
    return None


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, the first and the last among them."""
    return [round(place) for place in np.linspace(0, count - 1, min(count, most))]


def extract_frames(path: Path, most: int, media_dir: Path | None) -> list[str]:
    """Some frames of a video file as PNG files in `media_dir`, named by the video's content.

    Raises:
        RowError: OpenCV is not installed, or it cannot read the file.
        ValueError: there is no `media_dir`.
    """
    try:
        import cv2  # not needed otherwise; vllm brings it
    except ImportError as error:
        raise RowError(
            f"image {str(path)!r} is a video: install opencv-python-headless, or extract its frames into a folder and "
            "name that"
        ) from error
    if media_dir is None:
        raise ValueError(f"{path} is a video: give media_dir, the folder to write its frames to")
    count = sum(1 for _ in _grabbed(cv2, path))  # what the header says is often wrong
    if count < _FEWEST:
        raise RowError(f"video {str(path)!r} has {count} frames that can be decoded: it is damaged, or no video")
    wanted = set(evenly_spaced(count, most))
    name = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()[:32]
    found = []
    for number, capture in enumerate(_grabbed(cv2, path)):
        if number not in wanted:
            continue
        target = media_dir / f"{name}-{number:06}.png"
        if not target.exists():
            decoded, picture = capture.retrieve()
            if not decoded:
                raise RowError(f"video {str(path)!r}: frame {number} cannot be decoded")
            buffer = io.BytesIO()
            Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)).save(buffer, "PNG")
            write_bytes(target, buffer.getvalue())
        found.append(str(target))
    return found


def _grabbed(cv2: Any, path: Path) -> Iterator[Any]:
    """The capture, once for every frame."""
    capture = cv2.VideoCapture(os.fspath(path))
    try:
        while capture.grab():
            yield capture
    finally:
        capture.release()
