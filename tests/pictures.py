"""One picture in every mode, file format and orientation that image files come in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

SIZE = (96, 64)  # width, height: a picture on its side has another grid of patches


def colors() -> Image.Image:
    """RGB, every corner different, so that a turned or mirrored copy differs."""
    height, width = SIZE[1], SIZE[0]
    rows, columns = np.mgrid[0:height, 0:width]
    values = np.stack([255 * columns // width, 255 * rows // height, (rows * columns) % 256], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


def with_alpha() -> Image.Image:
    """RGBA from transparent at the left to opaque at the right."""
    picture = colors().convert("RGBA")
    picture.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, SIZE[0]).astype(np.uint8), (SIZE[1], 1))))
    return picture


def write_pictures(folder: Path) -> dict[str, Path]:
    """Pictures of at most 8 bits per channel, by what is special about them."""
    rgb, rgba, palette = colors(), with_alpha(), colors().quantize(32)
    paths: dict[str, Path] = {}

    def save(name: str, picture: Image.Image, suffix: str = "png", **options: object) -> None:
        paths[name] = folder / f"{name}.{suffix}"
        picture.save(paths[name], **options)

    save("1", rgb.convert("1"))
    save("L", rgb.convert("L"))
    save("L with transparency", rgb.convert("L"), transparency=120)
    save("LA", rgba.convert("LA"))
    save("P", palette)
    save("P with transparency", palette, transparency=3)
    save("P with alpha per color", palette, transparency=bytes(range(0, 256, 8)))
    save("RGB", rgb)
    save("RGB with transparency", rgb, transparency=(0, 0, 0))
    save("RGBA", rgba)
    save("CMYK", rgb.convert("CMYK"), "jpg")
    save("YCbCr tiff", rgb, "tiff", compression="jpeg")
    save("LAB tiff", rgb.convert("LAB"), "tiff")
    save("RGBA tiff", rgba, "tiff")
    save("RGBA tga", rgba, "tga")
    save("bmp", rgb, "bmp")
    save("ppm", rgb, "ppm")
    save("jp2", rgb, "jp2")
    save("gif with transparency", palette, "gif", transparency=3)
    save("animated gif", palette, "gif", save_all=True, append_images=[palette.rotate(180)], transparency=3)
    save("webp with alpha", rgba, "webp", lossless=True)
    save("animated webp", rgba, "webp", save_all=True, append_images=[rgba.rotate(180)], lossless=True)
    save("mpo", rgb, "mpo", save_all=True, append_images=[rgb.rotate(180)])
    rgb16 = np.asarray(rgb).astype(">u2") * 257
    (folder / "RGB of 16 bits.ppm").write_bytes(b"P6 %d %d 65535\n" % SIZE + rgb16.tobytes())
    paths["RGB of 16 bits"] = folder / "RGB of 16 bits.ppm"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        save(f"jpeg orientation {orientation}", rgb, "jpg", exif=exif, quality=95)
        save(f"png orientation {orientation} with alpha", rgba, "png", exif=exif)
        save(f"tiff orientation {orientation}", rgb, "tiff", exif=exif)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    save("mpo orientation 6", rgb, "mpo", save_all=True, append_images=[rgb.rotate(180)], exif=exif)
    save("webp orientation 8", rgba, "webp", exif=exif, lossless=True)
    return paths


def write_deep_pictures(folder: Path) -> dict[str, Path]:
    """The same gray ramp, from black to white, with more than 8 bits per channel."""
    ramp = np.tile(np.linspace(0.0, 1.0, SIZE[0]), (SIZE[1], 1))
    values = {
        "I16.png": (ramp * 65535).astype(np.uint16),
        "I16.tiff": (ramp * 65535).astype(np.uint16),
        "I.tiff": (ramp * 65535).astype(np.int32),
        "I of 8 bits.tiff": (ramp * 255).astype(np.int32),
        "I with negatives.tiff": (ramp * 4000 - 2000).astype(np.int32),
        "F.tiff": ramp.astype(np.float32),
        "F of 255.tiff": (ramp * 255).astype(np.float32),
        "F of thousands.tiff": (ramp * 1e6).astype(np.float32),
    }
    paths = {name: folder / name for name in values}
    for name, array in values.items():
        Image.fromarray(array).save(paths[name])
    return paths
