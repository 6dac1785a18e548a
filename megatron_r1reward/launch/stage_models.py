"""Which model folders a stage reads, and whether it can: asked before a process starts or anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_r1reward.checkpoint.manifest import MANIFEST, find_damage
from megatron_r1reward.cluster.placement import Stage, asks_judge
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.model_folder.examine import folder_problems, served_problems
from megatron_r1reward.model_folder.prompt_policy import FILE, read_policy
from megatron_r1reward.servers.command import model_corrections


def model_problems(config: RunConfig, stage: Stage) -> Iterator[tuple[str, Path, str]]:
    """(key of the run file, folder, what is wrong) for all that is wrong with the folders that this stage reads."""
    path = config.model.path
    if stage in ("sft", "rl"):
        # Servers that are started here load the folder's weights, whatever the trainer begins with.
        serves = stage == "rl" and not config.rollout.urls and config.rl.replay is None
        weights = config.checkpoint.init_from is None or serves
        yield from (("model.path", path, text) for text in folder_problems(path, weights=weights))
        if (first := config.checkpoint.init_from) is not None:
            yield from (("checkpoint.init_from", first, text) for text in _checkpoint_problems(first))
        if serves:
            yield from (("model.path", path, text) for text in _serving_problems(path, config))
    elif stage == "eval":
        weights = not config.rollout.urls
        yield from (("model.path", path, text) for text in folder_problems(path, weights=weights, trainable=False))
        yield from (("model.path", path, text) for text in _asked_otherwise(config))
        if weights:
            yield from (("model.path", path, text) for text in _serving_problems(path, config))
    elif stage == "serve":
        path = config.rollout.model_path or path
        if not config.rollout.urls:
            yield from (("model.path", path, text) for text in served_problems(path))
    elif stage == "annotate" and config.annotate.url is None:
        yield from (("model.path", path, text) for text in served_problems(path))
    judge = config.judge
    judged = stage == "judge" or asks_judge(config, stage)
    if judged and not judge.urls and judge.model_path is not None:
        yield from (("judge.model_path", judge.model_path, text) for text in served_problems(judge.model_path))


def _asked_otherwise(config: RunConfig) -> Iterator[str]:
    """Where an evaluation would not ask as the folder says that it is asked."""
    try:
        policy = read_policy(config.model.path)
    except ValueError as error:
        yield str(error)
        return
    ours = (config.data.min_pixels, config.data.max_pixels)
    if policy is not None and policy.pixels not in (None, ours):
        assert policy.pixels is not None
        yield (
            f"its {FILE} says images of {policy.pixels[0]} to {policy.pixels[1]} pixels, and data.min_pixels, "
            f"data.max_pixels are {ours[0]} and {ours[1]}: set them to the model's"
        )


def _checkpoint_problems(folder: Path) -> Iterator[str]:
    """What keeps a folder from giving a model its first weights; hashes are compared when they are read."""
    steps = sorted(path.name for path in folder.glob("step-*") if path.is_dir())
    if not folder.is_dir():
        yield "there is no such folder: name what `r1reward convert import` wrote, or a step folder of a run"
    elif steps and not (folder / MANIFEST).is_file():
        yield f"it holds {len(steps)} checkpoints: name one of them, e.g. {folder / steps[-1]}"
    elif (folder / "config.json").is_file() and not (folder / MANIFEST).is_file():
        yield "it is a Hugging Face folder: name it as model.path, or what `r1reward convert import` makes of it"
    else:
        yield from (f"{text}: copy it again, or name another" for text in find_damage(folder, hashes=False))


def _serving_problems(path: Path, config: RunConfig) -> Iterator[str]:
    """What a rollout server of this folder would not start with."""
    try:
        model_corrections(path, config.rollout)
    except ValueError as error:
        yield str(error)


def check_models(config: RunConfig, stage: Stage) -> None:
    """ValueError that names everything that is wrong with the folders that this stage reads."""
    by_folder: dict[tuple[str, Path], list[str]] = {}
    for key, folder, text in model_problems(config, stage):
        by_folder.setdefault((key, folder), []).append(text)
    if by_folder:
        parts = (f"{key} {folder} cannot be used: {'; '.join(lines)}" for (key, folder), lines in by_folder.items())
        raise ValueError("; ".join(parts))
