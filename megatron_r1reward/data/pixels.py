"""Pixels for the trainer: the checkpoint's own image processor, used where the pixels are needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor

from megatron_r1reward.data.image_files import decode


@dataclass(frozen=True, kw_only=True)
class ProcessedImage:
    """pixel_values float32 [P, patch_dim]; grid (frames, rows, columns) in patches, P = frames * rows * columns."""

    pixel_values: torch.Tensor
    grid: tuple[int, int, int]


class ImageProcessor:
    """Decode, resize and patchify images with the processor of a checkpoint folder, as vLLM does with the same folder.

    The most recent `cache_size` images stay in memory: samples of one prompt and repeated passes share them.
    """

    def __init__(self, folder: Path, *, min_pixels: int, max_pixels: int, cache_size: int = 4096) -> None:
        # vLLM reads the limits from the folder unless told otherwise, so both sides get the run file's values.
        self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.merge_size = int(self.processor.merge_size)
        self._cached = lru_cache(maxsize=cache_size)(self._process)
        self.num_patches = lru_cache(maxsize=16 * cache_size)(self._num_patches)

    def __call__(self, path: str) -> ProcessedImage:
        """Raises OSError or ValueError when the file is not an image that `decode` takes."""
        return self._cached(path)

    def _process(self, path: str) -> ProcessedImage:
        features = self.processor(
            images=decode(path), min_pixels=self.min_pixels, max_pixels=self.max_pixels, return_tensors="pt"
        )
        frames, rows, columns = features["image_grid_thw"][0].tolist()
        return ProcessedImage(pixel_values=features["pixel_values"].float(), grid=(frames, rows, columns))

    def _num_patches(self, path: str) -> int:
        """Of an image that is not decoded: from the size in its header, before its orientation is applied, which may
        change the number by one row. Raises OSError when it is no image."""
        with Image.open(path) as image:
            width, height = image.size
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return int(self.processor.get_number_of_image_patches(height, width, limits))

    def num_tokens(self, image: ProcessedImage) -> int:
        """Language-model tokens of an image: one per merged unit of patches."""
        frames, rows, columns = image.grid
        return frames * rows * columns // self.merge_size**2
