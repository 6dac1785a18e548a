"""Where a model's `config.json` comes from: the folder that the run file names, or a copy shipped with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.model_folder.beside_weights import check_files
from megatron_r1reward.model_folder.examine import folder_problems
from megatron_r1reward.model_folder.shape import ModelShape, load_shape, read_shape


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of a model and what is known about its files. `weights` says whether safetensors lie in the folder."""

    name: str
    shape: ModelShape
    source: str
    weights: bool


def bundled_names() -> tuple[str, ...]:
    """Names of the shipped configurations, e.g. "Qwen2.5-VL-7B-Instruct"."""
    folder = resources.files(__package__) / "configs"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def bundled_config(name: str) -> dict[str, object]:
    """The parsed `config.json` of a shipped model."""
    tree: dict[str, object] = json.loads((resources.files(__package__) / "configs" / f"{name}.json").read_text())
    return tree


def check_model(path: Path, stand_in: str | None = None) -> None:
    """ValueError where the folder that the run file names is there and cannot be used as a stage would use it; without
    weights, as `find_model` uses it."""
    find_model(path, stand_in)
    if any(path.glob("*.safetensors")):
        if problems := list(folder_problems(path, trainable=False, scalar=True)):
            raise ValueError(f"model.path {path} cannot be used: {'; '.join(problems)}")
    elif path.is_dir():
        check_files(path)


def find_model(path: Path, stand_in: str | None = None) -> Model:
    """The model at `path`. Where that folder does not exist: the shipped configuration `stand_in`, or the one named
    like the last part of `path`.

    Raises:
        ValueError: neither exists, or the configuration is of another family.
    """
    file = path / "config.json"
    if file.is_file():
        shape = load_shape(path)
        return Model(name=path.name, shape=shape, source=str(file), weights=any(path.glob("*.safetensors")))
    name = stand_in if stand_in is not None else path.name
    if name in bundled_names():
        shape = read_shape(bundled_config(name), name)
        return Model(name=name, shape=shape, source=f"the shipped configuration {name}", weights=False)
    raise ValueError(
        f"{path} holds no config.json and {name!r} is no shipped configuration: download the model, or set plan.model "
        f"to one of {', '.join(bundled_names())}"
    )


def find_critic(config: RunConfig) -> ModelShape | None:
    """The critic that RL trains beside the policy, where it trains one.

    Raises:
        ValueError: as `find_model`.
    """
    if not config.algorithm.needs_critic:
        return None
    path = config.critic.path
    shape = find_model(path or config.model.path, config.plan.model if path is None else None).shape
    layers = shape.score_layers or config.critic.score_layers or 1
    return replace(shape, text=replace(shape.text, tied=False), score_layers=layers)
