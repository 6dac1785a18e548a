"""Shared fixtures. Ranks and kernels are small: one thread each keeps two cores from fighting."""

from __future__ import annotations

from pathlib import Path

import interpreted_triton  # noqa: F401  (before anything that imports Triton)
import numpy as np
import pytest
import torch
from corpus import CORPUS
from PIL import Image

import megatron_r1reward.parallel  # noqa: F401  (adapts megatron-core to the CPU before anything imports it)

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Qwen2.5-VL whose distributions are far from uniform."""
    from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_tiny_checkpoint(folder, corpus=CORPUS, init_std=0.15)
    return folder


@pytest.fixture(scope="session")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Images of three shapes, with windows that are full and ragged."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    paths = []
    for index, (width, height) in enumerate([(56, 56), (168, 84), (140, 196)]):
        path = folder / f"{index}.png"
        small = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return tuple(paths)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ranks first: they are forked from this process, which must not have started threads by then. Servers last."""

    def stage(item: pytest.Item) -> int:
        order = {"parallel": 0, "e2e": 2, "slurm": 3}
        return next((place for marker, place in order.items() if item.get_closest_marker(marker)), 1)

    items.sort(key=stage)
