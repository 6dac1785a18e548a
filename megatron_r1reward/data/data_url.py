"""Images as text: for requests to remote endpoints and for pages without external files."""

from __future__ import annotations

import base64
from pathlib import Path

from PIL import Image


def data_url(path: str | Path) -> str:
    """The image file as a base64 data URL, its bytes unchanged.

    Raises:
        OSError: the file is missing, or not an image in a format that has a MIME type.
    """
    with Image.open(path) as image:
        mime = image.get_format_mimetype()
    if mime is None:
        raise OSError(f"{path} has no MIME type: convert it to PNG, JPEG or WebP")
    return f"data:{mime};base64,{base64.b64encode(Path(path).read_bytes()).decode('ascii')}"
