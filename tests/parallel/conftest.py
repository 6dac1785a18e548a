"""Models and images of the parity benchmark, and the trace of a single process, once per session."""

from __future__ import annotations

from pathlib import Path

import interpreted_triton  # noqa: F401  (first: this file is read before pytest is configured, and imports torch)
import parallel_parity as parity
import pytest
from forked_ranks import run_ranks
from parity_layouts import SINGLE
from PIL import Image
from transformers import AutoImageProcessor


@pytest.fixture(scope="session")
def parity_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return parity.write_images(tmp_path_factory.mktemp("parity-images"))


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint folder per family, written in the parent: ranks only read it. What reading imports is imported
    here, once for all ranks."""
    folders = {}
    for name in parity.FAMILIES:
        folders[name] = tmp_path_factory.mktemp(name) / "tiny"
        parity.write_family(name, folders[name])
        AutoImageProcessor.from_pretrained(folders[name])
    Image.init()
    return folders


@pytest.fixture(scope="session")
def parity_references(families: dict[str, Path], parity_images: tuple[str, ...]) -> dict[str, parity.Trace]:
    return {
        name: run_ranks(parity.two_steps, 1, folder, parity_images, SINGLE, 100_000)[0]
        for name, folder in families.items()
    }


@pytest.fixture(scope="session")
def folder(families: dict[str, Path]) -> Path:
    return families["qwen2_5_vl"]
