"""Where a row's images are: paths kept inside one folder, embedded ones written out once, all of them verified."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_r1reward.data.rows import RowError
from megatron_r1reward.files import write_bytes

MAX_ASPECT_RATIO = 200  # the Qwen-VL image processors refuse more

_DATA_URL = re.compile(r"data:[^,]*;base64,(?P<payload>.*)", re.DOTALL)
# Base64 beginnings of JPEG, PNG, GIF, WebP and BMP. A path would have to consist of base64 letters as well, i.e. have
# no file name extension, to be mistaken for an embedded image.
_BASE64_IMAGE = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk)[A-Za-z0-9+/\s]{24,}={0,2}\s*")


class MediaResolver:
    """Turns an `image` field into absolute paths.

    A field is a path, raw bytes, a base64 string, a data URL, a `{"bytes", "path"}` mapping, or a list of these.

    Args:
        image_root: relative paths are resolved against it, and every path must stay inside it, links followed.
        media_dir: embedded images are written here, named by content; None refuses them.
    """

    def __init__(self, image_root: Path, media_dir: Path | None) -> None:
        self._root = image_root.resolve()
        self._media_dir = media_dir.resolve() if media_dir is not None else None

    def resolve(self, value: Any) -> tuple[str, ...]:
        """Absolute paths of the images in `value`, in order; empty for None or an empty list.

        Raises:
            RowError: an image is empty, undecodable, missing, remote, or outside `image_root`.
            ValueError: an image is embedded and there is no `media_dir`.
        """
        if value is None:
            return ()
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(self._resolve_one(item) for item in values)

    def _resolve_one(self, value: Any) -> str:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise RowError("image is empty")
        if isinstance(value, bytes):
            return self._store(value)
        if not isinstance(value, str):
            raise RowError(f"image is {type(value).__name__}, not a path or embedded image")
        data_url = _DATA_URL.fullmatch(value)
        if data_url is not None:
            return self._store(_decode_base64(data_url["payload"]))
        if _BASE64_IMAGE.fullmatch(value):
            return self._store(_decode_base64(value))
        return self._locate(value)

    def _locate(self, name: str) -> str:
        if not name.strip():
            raise RowError("image path is empty")
        if name.startswith(("http://", "https://")):
            raise RowError(f"image {name[:100]!r} is remote: download it and give its path")
        try:
            path = (self._root / name.removeprefix("file://")).resolve()
            exists = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null character, a loop of links
            raise RowError(f"image path {name[:100]!r} is not usable as a path") from error
        if not path.is_relative_to(self._root):
            raise RowError(f"image {name!r} leaves the image root {self._root}")
        if not exists:
            raise RowError(f"image {name!r} is missing under {self._root}")
        return str(path)

    def _store(self, content: bytes) -> str:
        if not content:
            raise RowError("embedded image is empty")
        if self._media_dir is None:
            raise ValueError("rows embed their images: give media_dir, the folder to write them to")
        try:
            with Image.open(io.BytesIO(content)) as image:
                suffix = (image.format or "image").lower()
        except (OSError, Image.DecompressionBombError) as error:
            raise RowError(f"embedded image of {len(content)} bytes is in no known format or too large") from error
        path = self._media_dir / f"{hashlib.sha256(content).hexdigest()[:32]}.{suffix}"
        if not path.exists():
            write_bytes(path, content)
        return str(path)


def image_problems(paths: Iterable[str]) -> dict[str, str]:
    """Decode every distinct image completely, in threads; returns the reason for each that cannot be used."""
    distinct = sorted(set(paths))
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        reasons = pool.map(_problem, distinct)
    return {path: reason for path, reason in zip(distinct, reasons, strict=True) if reason}


def _problem(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            short, long = sorted(image.size)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        return f"image {path!r} is corrupt: {error}"
    if long > MAX_ASPECT_RATIO * short:
        return f"image {path!r} is {long} by {short} pixels: its aspect ratio exceeds {MAX_ASPECT_RATIO}"
    return None


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise RowError(f"embedded image is not valid base64: {error}") from error
