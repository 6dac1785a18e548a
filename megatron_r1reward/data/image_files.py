"""Image files: where a row's are, and the one way in which trainer, checks, evaluation and report decode them.

vLLM's loader turns a photograph upright by its EXIF orientation and puts transparency on white. Log-probabilities of
trainer and server belong to the same picture only if everything here decodes as it does; tests/e2e compares the two bit
by bit.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import itertools
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from megatron_r1reward.config.data_section import MAX_FRAMES
from megatron_r1reward.data.near_duplicates import thumbnail
from megatron_r1reward.data.rows import RowError
from megatron_r1reward.data.video_frames import VIDEOS, evenly_spaced, extract_frames
from megatron_r1reward.files import LFS_POINTER, write_bytes

MAX_ASPECT_RATIO = 200  # the Qwen-VL image processors refuse more
# Formats of pictures that vLLM's loader opens, too. MPO, what phones write, opens as a JPEG with further pictures.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_WEB_FORMATS = {"GIF": "image/gif", "JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_TURNS_BY_90_DEGREES = (5, 6, 7, 8)  # values of the EXIF orientation

_ORIENTATION = ExifTags.Base.Orientation

_DATA_URL = re.compile(r"data:[^,]*;base64,(?P<payload>.*)", re.DOTALL)
# Base64 beginnings of JPEG, PNG, GIF, WebP, BMP, TIFF and AVIF. A path would have to consist of base64 letters as well,
# i.e. have no file name extension, to be mistaken for an embedded image. Longer texts may be pictures of any format.
_BASE64_IMAGE = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkq|TU0A|AAAA)[A-Za-z0-9+/\s]{24,}={0,2}\s*")
_LONG_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{256,}={0,2}\s*")
_SHOWN = 100  # characters of a path in a message
_ENTRIES = 20_000  # of folders that are looked through for links


class MediaResolver:
    """Turns an `image` field into absolute paths.

    A field is a path, raw bytes, a base64 string, a data URL, a `{"bytes", "path"}` mapping, `{"frames": ...}` with a
    folder, a list of images or a video file, or a list of these.

    Args:
        roots: relative paths are resolved against the first; every path must be inside one of them as it is written.
            Symbolic links in them are followed, wherever they lead: whoever may write there made them.
        media_dir: embedded images and frames of videos are written here, named by content; None refuses them.
        max_frames: of a video.
    """

    def __init__(self, roots: Sequence[Path], media_dir: Path | None, *, max_frames: int = MAX_FRAMES) -> None:
        self._max_frames = max_frames
        self._root = Path(os.path.abspath(roots[0]))
        self._allowed = {place for root in roots for place in (Path(os.path.abspath(root)), root.resolve())}
        self.media_dir = media_dir.resolve() if media_dir is not None else None

    def resolve(self, value: Any) -> tuple[str, ...]:
        """Absolute paths of the images in `value`, in order; empty for None or an empty list.

        Raises:
            RowError: an image is empty, undecodable, missing, remote, or outside the roots.
            ValueError: an image is embedded and there is no `media_dir`.
        """
        if value is None:
            return ()
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(path for item in values for path in self._files(item))

    def _files(self, value: Any) -> list[str]:
        """The file of an image, or frames of a video, evenly spaced."""
        if not isinstance(value, Mapping) or value.get("frames") is None:
            return [self._resolve_one(value)]
        frames = value["frames"]
        if isinstance(frames, list | tuple):
            return [self._resolve_one(frames[place]) for place in evenly_spaced(len(frames), self._max_frames)]
        name = str(frames)
        if Path(name).suffix.lower() in VIDEOS:
            return extract_frames(Path(self._locate(name, video=True)), self._max_frames, self.media_dir)
        path = self._locate(name, folder=True)
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        if not names:
            raise RowError(f"folder of frames {path!r} is empty")
        return [os.path.join(path, names[place]) for place in evenly_spaced(len(names), self._max_frames)]

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
        if _LONG_BASE64.fullmatch(value):
            with contextlib.suppress(RowError):
                return self._store(_decode_base64(value))
        return self._locate(value)

    def _locate(self, name: str, *, folder: bool = False, video: bool = False) -> str:
        if not name.strip():
            raise RowError("image path is empty")
        shown = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...")
        if name.startswith(("http://", "https://")):
            raise RowError(f"image {shown} is remote: download it and give its path")
        try:
            # Not resolved: `..` in a row counts as text, links on the disk count as what the user made.
            path = Path(os.path.normpath(self._root / name.removeprefix("file://")))
            inside = any(path.is_relative_to(root) for root in self._allowed)
            exists, target = path.is_dir() if folder else path.is_file(), path.resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null character, a loop of links
            raise RowError(f"image path {shown} is not usable as a path, nor base64 of a picture") from error
        if not inside:
            raise RowError(f"image {shown} leaves the image root {self._root}; data.image_roots takes further folders")
        if path.suffix.lower() in VIDEOS and not video:
            raise RowError(f"image {shown} is a video: name it in the column video, or a folder with its frames")
        if not exists:
            link = f": it leads to {target}" if target != path else ""
            raise RowError(f"image {shown} is missing under {self._root}{link}")
        return str(path)

    def _store(self, content: bytes) -> str:
        if not content:
            raise RowError("embedded image is empty")
        if self.media_dir is None:
            raise ValueError("rows embed their images: give media_dir, the folder to write them to")
        try:
            with Image.open(io.BytesIO(content)) as image:
                suffix = (image.format or "image").lower()
        except (OSError, Image.DecompressionBombError) as error:
            raise RowError(f"embedded image of {len(content)} bytes is in no known format or too large") from error
        return _write_by_content(content, self.media_dir, "jpeg" if suffix == "mpo" else suffix)


def folders_behind_links(root: Path) -> list[Path]:
    """Folders outside of `root` that links to folders or image files in it lead to, as download caches have them.

    Looks at no more than `_ENTRIES` entries, nearest first, and into no hidden folder.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
    home, found, seen = root.resolve(), dict[Path, None](), set[Path]()
    waiting, limit = deque([home]), _ENTRIES
    while waiting and limit > 0:
        folder = waiting.popleft()
        if folder in seen:
            continue
        seen.add(folder)
        try:
            with os.scandir(folder) as listing:
                entries = list(itertools.islice(listing, limit))
        except OSError:  # closed to us
            continue
        limit -= len(entries)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_symlink():
                if entry.is_dir():
                    waiting.append(Path(entry.path))
                continue
            try:
                target = Path(entry.path).resolve()
                leads_to_folder = target.is_dir()
            except (OSError, RuntimeError):  # into a folder that is closed to us; a loop of links
                continue
            if leads_to_folder:
                waiting.append(target)
            elif Path(entry.name).suffix.lower() in suffixes:
                target = target.parent
            else:
                continue
            if not target.is_relative_to(home):
                found[target] = None
    return list(found)


@dataclass(frozen=True, kw_only=True)
class Examined:
    """`path`: the file to use, another one where the picture had to be rescaled to 8 bits. `problem`: why it cannot be
    used, empty where it can. `thumbnail`: of `near_duplicates`, where it was asked for."""

    path: str
    problem: str = ""
    thumbnail: bytes = b""


def examine_images(paths: Iterable[str], media_dir: Path | None, *, thumbnails: bool = False) -> dict[str, Examined]:
    """Decode every distinct image completely, in threads.

    Servers would clip pictures of more than 8 bits per channel to white or black. Their 8-bit copies, named by content,
    are written to `media_dir`; without one such pictures are a problem.
    """
    distinct = sorted(set(paths))
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(distinct, pool.map(lambda path: _examine(path, media_dir, thumbnails), distinct), strict=True))


class ImageCheck:
    """Decodes every image once over several calls. Of those that are as they should be only the path is kept."""

    def __init__(self, media_dir: Path | None) -> None:
        self._media_dir, self._sound = media_dir, set[str]()
        self._special: dict[str, Examined] = {}

    def __call__(self, paths: Set[str]) -> Mapping[str, Examined]:
        """Those with a problem, or with another file to use, of all that were ever asked about."""
        for path, found in examine_images(paths - self._sound - self._special.keys(), self._media_dir).items():
            if found.problem or found.path != path:
                self._special[path] = found
            else:
                self._sound.add(path)
        return self._special


def _examine(path: str, media_dir: Path | None, thumbnails: bool) -> Examined:
    try:
        with _open(path) as image:
            deep = is_deep(image.mode)
            if deep and media_dir is not None:
                path = _write_8_bit(image, path, media_dir)
        picture = decode(path)
        short, long = sorted(picture.size)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on damaged files
        return Examined(path=path, problem=f"image {path!r} is corrupt: {error}{_lfs_hint(path)}")
    if long > MAX_ASPECT_RATIO * short:
        problem = f"image {path!r} is {long} by {short} pixels: its aspect ratio exceeds {MAX_ASPECT_RATIO}"
        return Examined(path=path, problem=problem)
    return Examined(path=path, thumbnail=thumbnail(picture) if thumbnails else b"")


def decode(path: str | Path) -> Image.Image:
    """The picture as vLLM's loader gives it: mode RGB, upright, transparency on white, the first of several frames.

    Raises:
        OSError: not a picture, damaged, or in a format that servers do not open.
        ValueError: more than 8 bits per channel, or a color space without a way to RGB.
    """
    with _open(path) as image:
        if is_deep(image.mode):
            raise ValueError(
                f"{path} has mode {image.mode}, more than 8 bits per channel, which servers clip: read it by "
                "`r1reward data import`, which writes 8-bit copies"
            )
        upright = _upright(image)
        upright.load()
    if upright.mode == "RGB":
        return upright
    if upright.mode not in ("RGBA", "LA", "PA") and "transparency" not in upright.info:
        return upright.convert("RGB")
    transparent = upright.convert("RGBA")
    white = Image.new("RGB", transparent.size, (255, 255, 255))
    white.paste(transparent, mask=transparent.getchannel("A"))
    return white


def upright_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of what `decode` returns, from the header alone."""
    with _open(path) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow has turned its size already
            return width, height
        with contextlib.suppress(Exception):  # as in `_upright`
            if image.getexif().get(_ORIENTATION) in _TURNS_BY_90_DEGREES:
                return height, width
        return width, height


def data_url(path: str | Path) -> str:
    """The picture of `decode` as a base64 data URL, for remote endpoints and pages without external files.

    The file's own bytes where every program sees the same picture in them, else a PNG.

    Raises:
        OSError, ValueError: as `decode`.
    """
    with _open(path) as image:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        plain = image.mode in ("L", "RGB") and "transparency" not in image.info and frames == 1
        mime = _WEB_FORMATS.get(image.format or "") if plain and image.getexif().get(_ORIENTATION, 1) == 1 else None
    if mime is not None:
        content = Path(path).read_bytes()
    else:
        buffer = io.BytesIO()
        decode(path).save(buffer, "PNG")
        mime, content = "image/png", buffer.getvalue()
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def is_deep(mode: str) -> bool:
    """Whether Pillow's `mode` has more than 8 bits per channel."""
    return mode.startswith("I") or mode == "F"


def _open(path: str | Path) -> Image.Image:
    return Image.open(path, formats=FORMATS)


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # damaged EXIF data say nothing about the picture
        return ImageOps.exif_transpose(image)
    return image


def _write_8_bit(image: Image.Image, path: str, media_dir: Path) -> str:
    upright = _upright(image)
    upright.load()
    buffer = io.BytesIO()
    Image.fromarray(_to_8_bit(np.asarray(upright, dtype=np.float64), upright.mode)).save(buffer, "PNG")
    return _write_by_content(buffer.getvalue(), media_dir, "png")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """uint8 [height, width]. The full range is that of the mode, or the smallest of 1 (floats), 255 and 65535 that
    holds all values; values beyond those are stretched from lowest to highest.

    Raises:
        ValueError: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    ranges = (65535.0,) if mode.startswith("I;16") else (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    full = next((full for full in ranges if high <= full), None)
    if low < 0 or full is None:
        values, full = values - low, (high - low) or 1.0
    return np.rint(values * (255.0 / full)).astype(np.uint8)


def _write_by_content(content: bytes, folder: Path, suffix: str) -> str:
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.{suffix}"
    if not path.exists():
        write_bytes(path, content)
    return str(path)


def _lfs_hint(path: str) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return " (a git-lfs pointer: run `git lfs pull`)"
    return ""


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise RowError(f"embedded image is not valid base64: {error}") from error
