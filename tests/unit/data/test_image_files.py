"""One decoder: upright, transparency on white, 8 bits. tests/e2e/test_pictures.py compares it with vLLM's."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pictures import SIZE, colors, write_deep_pictures, write_pictures
from PIL import Image

from megatron_r1reward.data.image_files import data_url, decode, examine_images, upright_size
from megatron_r1reward.data.pixels import ImageProcessor
from megatron_r1reward.data.preference import read_preferences
from megatron_r1reward.evaluation.control_sets import shuffle_images
from megatron_r1reward.types import Preference


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_the_header_tells_the_size_that_is_seen(pictures: dict[str, Path]) -> None:
    """Every mode, format and orientation; Pillow turns a TIFF's size itself, and nobody may turn it again."""
    assert {name: upright_size(path) for name, path in pictures.items()} == {
        name: decode(path).size for name, path in pictures.items()
    }


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("name", ["LA", "RGBA", "RGBA tiff", "RGBA tga", "webp with alpha", "animated webp"])
def test_transparency_becomes_white(pictures: dict[str, Path], name: str) -> None:
    picture = pixels(decode(pictures[name]))
    assert (picture[:, 0] == 255).all()  # transparent at the left, whatever color lies beneath
    assert (
        np.abs(picture[:, -1] - pixels(colors().convert("L" if name == "LA" else "RGB").convert("RGB"))[:, -1]).max()
        < 3
    )


def test_a_palette_with_a_transparent_color_is_white_there(pictures: dict[str, Path]) -> None:
    plain, transparent = pixels(decode(pictures["P"])), pixels(decode(pictures["P with transparency"]))
    changed = (plain != transparent).any(axis=-1)
    assert changed.any()
    assert (transparent[changed] == 255).all()
    assert (pixels(decode(pictures["gif with transparency"])) == 255).all(axis=-1).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(pictures: dict[str, Path], orientation: int, tiny_folder: Path) -> None:
    path = pictures[f"jpeg orientation {orientation}"]
    stored, turned = pixels(decode(pictures["jpeg orientation 1"])), pixels(decode(path))
    want = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation](stored)
    assert np.array_equal(turned, want)
    on_its_side = orientation > 4
    assert upright_size(path) == (SIZE[::-1] if on_its_side else SIZE)
    processor = ImageProcessor(tiny_folder, min_pixels=3136, max_pixels=501_760)
    _, rows, columns = processor(str(path)).grid
    assert (rows > columns) == on_its_side


@pytest.mark.parametrize("where", ["png", "tiff"])
def test_pictures_of_more_than_8_bits_are_scaled_and_written_out(tmp_path: Path, where: str) -> None:
    paths = [str(path) for path in write_deep_pictures(tmp_path).values() if path.suffix == f".{where}"]
    examined = examine_images(paths, tmp_path / "media")
    for path in paths:
        assert examined[path].problem == ""
        ramp = pixels(decode(examined[path].path))[0, :, 0]
        assert np.abs(ramp - np.linspace(0, 255, SIZE[0])).max() <= 1, path
        with pytest.raises(ValueError, match="more than 8 bits"):
            decode(path)  # never clipped in silence
    assert all("more than 8 bits" in image.problem for image in examine_images(paths, None).values())


def test_the_reader_takes_the_scaled_copy_and_sets_aside_what_has_none(tmp_path: Path) -> None:
    write_deep_pictures(tmp_path)
    Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    row = {"question": "q", "response_1": "a", "response_2": "b", "answer": 1}
    names = ["I16.png", "nan.tiff", "lfs.png"]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({**row, "image": name}) + "\n" for name in names))
    result = read_preferences(source, media_dir=tmp_path / "media")
    (preference,) = result.preferences
    assert Path(preference.image_paths[0]).parent == tmp_path / "media"
    assert decode(preference.image_paths[0]).size == SIZE
    reasons = [json.loads(line)["reason"] for line in result.quarantine_path.read_text().splitlines()]
    assert "not finite" in reasons[0]
    assert "git lfs pull" in reasons[1]


def test_remote_endpoints_and_pages_get_the_same_picture(pictures: dict[str, Path]) -> None:
    for name, path in pictures.items():
        head, payload = data_url(path).split(";base64,")
        content = base64.b64decode(payload)
        shown = Image.open(io.BytesIO(content))
        assert head.removeprefix("data:") in ("image/png", "image/jpeg", "image/webp", "image/gif"), name
        assert shown.getexif().get(0x0112, 1) == 1, name
        assert np.array_equal(pixels(shown.convert("RGB")), pixels(decode(path))), name
    for name in ("RGB", "L", "jpeg orientation 1", "mpo"):  # no second compression where none is needed
        assert base64.b64decode(data_url(pictures[name]).split(",")[1]) == pictures[name].read_bytes()


def test_the_control_exchanges_pictures_of_equal_upright_size(pictures: dict[str, Path]) -> None:
    def preference(name: str) -> Preference:
        return Preference(id=name, question="q", responses=("a", "b"), label=1, image_paths=(str(pictures[name]),))

    upright = [preference("RGB"), preference("CMYK")]
    on_their_side = [preference("jpeg orientation 6"), preference("jpeg orientation 8")]
    shuffled = shuffle_images([*upright, *on_their_side], seed=0)
    assert len(shuffled) == 4
    for before, after in zip([*upright, *on_their_side], shuffled, strict=True):
        assert upright_size(before.image_paths[0]) == upright_size(after.image_paths[0])
        assert before.image_paths != after.image_paths
