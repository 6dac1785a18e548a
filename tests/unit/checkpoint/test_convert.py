"""Conversion both ways without a model: byte for byte, resumable, strict about names, honest about damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1reward.checkpoint.convert import export_folder, import_folder


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def sharded_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bfloat16, in three files with an index, as large models are published."""
    folder = tmp_path_factory.mktemp("sharded") / "hf"
    shutil.copytree(tiny_folder, folder)
    tensors = {k: v.to(torch.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def round_trip(folder: Path, tmp_path: Path) -> Path:
    import_folder(folder, tmp_path / "megatron", progress=False)
    export_folder(tmp_path / "megatron", tmp_path / "back", progress=False)
    return tmp_path / "back"


def test_every_file_comes_back_byte_for_byte(tiny_folder: Path, sharded_folder: Path, tmp_path: Path) -> None:
    for number, folder in enumerate((tiny_folder, sharded_folder)):
        (tmp_path / str(number)).mkdir()
        assert digests(round_trip(folder, tmp_path / str(number))) == digests(folder)
