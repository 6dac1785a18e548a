"""What lies where a model folder was asked for, and what to give instead: a file, a run, its checkpoints, a cache,
weights of another format."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

FORMAT_FILE = "metadata.json"  # of a distributed checkpoint
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CONFIG = "config.json"
_OF_CHECKPOINTS = (FORMAT_FILE, "manifest.json", ".metadata", "common.pt")


def is_distributed(folder: Path) -> bool:
    """Whether it is one of megatron-core's distributed checkpoints; a Hugging Face folder may hold a file of that name,
    too."""
    return (folder / FORMAT_FILE).is_file() and not (folder / _CONFIG).is_file()


def check_kind(folder: Path) -> None:
    """ValueError unless it is, or was to be, a Hugging Face folder or a checkpoint: asked before torch is imported."""
    if not any((folder / name).is_file() for name in (_CONFIG, *_OF_CHECKPOINTS)):
        raise ValueError(f"{folder} {instead_of_model(folder)}")


def instead_of_model(path: Path) -> str:
    """What `path` is, which is no Hugging Face folder, and what to give; to be read after the path."""
    if path.is_dir():
        return _of_folder(path)
    if path.is_symlink():
        return f"is a link to {os.readlink(path)}, which is not there: mend it, or give another folder"
    if path.exists():
        return _of_file(path)
    return "does not exist: give the folder that holds config.json"


def _of_file(path: Path) -> str:
    folder = path.parent
    there = f"give its folder, {folder}" if (folder / _CONFIG).is_file() or is_distributed(folder) else ""
    if path.suffix == ".gguf":
        return "is a GGUF file, which is for other programs: give the Hugging Face folder that it was made from"
    if path.suffix in _PICKLES:
        return "is a pickle: give a Hugging Face folder whose weights are safetensors"
    if path.suffix == ".toml":
        return "is a run file: give a model folder, e.g. its model.path, or hf in its run.output_dir"
    if path.suffix == ".safetensors":
        return f"is one file of weights: {there or 'give a folder that holds config.json and the tokenizer beside it'}"
    return f"is a file: {there or 'give the folder that holds config.json'}"


def _of_folder(folder: Path) -> str:
    if is_distributed(folder):
        return (
            "is a megatron-core checkpoint: `r1reward convert export` makes the Hugging Face folder that is needed here"
        )
    if folder.name.endswith(".partial"):
        return "is an unfinished conversion: start the same command again, or give another folder"
    if steps := _folders(folder.glob("step-*")):
        return f"holds {len(steps)} checkpoints: give one of them, e.g. {steps[-1]}"
    if (folder / "hf" / _CONFIG).is_file():
        return f"is the folder of a run: give the model that it exported, {folder / 'hf'}"
    if steps := _folders(folder.glob("checkpoints/step-*")):
        return f"is the folder of a run: give one of its {len(steps)} checkpoints, e.g. {steps[-1]}"
    for pattern in (f"snapshots/*/{_CONFIG}", f"*/{_CONFIG}", f"*/hf/{_CONFIG}"):
        if models := [path.parent for path in sorted(folder.glob(pattern))]:
            return f"holds no {_CONFIG}, but {len(models)} model folder(s): give one of them, e.g. {models[-1]}"
    suffixes = {path.suffix for path in folder.iterdir()}
    if ".gguf" in suffixes:
        return "holds GGUF files, which are for other programs: give the Hugging Face folder that they were made from"
    if ".safetensors" in suffixes:
        return f"holds no {_CONFIG}, but weights: copy it from the model that they are of"
    if suffixes & set(_PICKLES):
        return f"holds no {_CONFIG}, but pickles: give a Hugging Face folder whose weights are safetensors"
    if not suffixes:
        return f"is an empty folder: give the one that holds {_CONFIG}"
    return f"holds no {_CONFIG}: give a Hugging Face model folder"


def _folders(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_dir())
