"""Images as callers have them, as data URLs: files, bytes, PIL images, data URLs; never an address on the network."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Union

from PIL import Image

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

ImageInput = Union[str, Path, bytes, "PilImage"]
MAX_PIXELS = 100_000_000  # above it a small file may be a large picture; vLLM's own loader warns at 89 million


def image_url(image: ImageInput, *, max_pixels: int = MAX_PIXELS) -> str:
    """The image as a base64 data URL; the bytes of a file stay as they are, so the server decodes what we were given.

    Raises:
        ValueError: it cannot be read, is no image, is larger than `max_pixels`, or is a network address.
    """
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return _data_url(buffer.getvalue(), "image of the program", max_pixels)
    if isinstance(image, bytes):
        return _data_url(image, f"image of {len(image)} bytes", max_pixels)
    text = str(image)
    if text.startswith("data:"):
        return _data_url(_decode(text), "data URL", max_pixels)
    if "://" in text:
        raise ValueError(f"image {text[:200]!r} is a network address: load it and give the bytes, or a file's path")
    try:
        return _data_url(Path(text).read_bytes(), f"image {text[:200]}", max_pixels)
    except OSError as error:
        raise ValueError(f"image {text[:200]!r} cannot be read: {error.strerror or error}") from error


def _decode(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError(f"data URL {url[:60]!r} is not 'data:<type>;base64,<data>'")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"data URL {url[:60]!r} is not base64: {error}") from error


def _data_url(data: bytes, name: str, max_pixels: int) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                width, height, mime = *picture.size, picture.get_format_mimetype()
                if width * height > max_pixels:
                    raise ValueError(f"{name} has {width} x {height} pixels, more than {max_pixels}: make it smaller")
                picture.verify()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels: {error}") from error
    except (OSError, SyntaxError) as error:  # PIL reports damaged PNG chunks as SyntaxError
        raise ValueError(f"{name} is not a picture that can be read: {error}") from error
    if mime is None:
        raise ValueError(f"{name} has a format without a MIME type: convert it to PNG, JPEG or WebP")
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
