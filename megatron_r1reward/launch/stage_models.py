"""Which model folders a stage reads, and whether it can: asked before a process starts or anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_r1reward.cluster.placement import Stage
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.model_folder.examine import folder_problems, served_problems
from megatron_r1reward.model_folder.folder_weights import read_folder_weights
from megatron_r1reward.model_folder.prompt_policy import FILE, read_policy


def model_problems(config: RunConfig, stage: Stage) -> Iterator[tuple[str, Path, str]]:
    """(key of the run file, folder, what is wrong) for all that is wrong with the folders that this stage reads."""
    path = config.model.path
    if stage in ("sft", "rl"):
        # Servers that are started here load the folder's weights, whatever the trainer begins with.
        serves = stage == "rl" and not config.rollout.urls and config.rl.replay is None
        weights = config.checkpoint.init_from is None or serves
        yield from (("model.path", path, text) for text in folder_problems(path, weights=weights))
        if serves or (stage == "rl" and config.rollout.urls):
            yield from (("model.path", path, text) for text in _sampled_otherwise(path))
    elif stage == "eval":
        weights = not config.rollout.urls
        yield from (("model.path", path, text) for text in folder_problems(path, weights=weights, trainable=False))
        yield from (("model.path", path, text) for text in _asked_otherwise(config))
    elif stage == "annotate" and config.annotate.url is None:
        yield from (("model.path", path, text) for text in served_problems(path))
    judge = config.judge
    judged = stage == "judge" or (stage == "rl" and config.reward.use_judge and config.rl.replay is None)
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


def _sampled_otherwise(path: Path) -> Iterator[str]:
    """What vLLM reads or computes in another way than transformers and the trainer."""
    try:
        weights = read_folder_weights(path)
    except (ValueError, OSError):
        return  # said already
    if weights.has_transposed_experts:
        yield (
            "its experts are stacked as [experts, out, in], as transformers 5 saves them, and vLLM reads "
            "[experts, in, out]: run sft from it, whose export is in that order, or transpose them"
        )
    if weights.shape.text.rope.yarn is not None:
        yield (
            'config.json has rope_scaling of type "yarn", for which vLLM 0.32 takes original_max_position_embeddings '
            "four times with M-RoPE: it would sample from another model than the one that is trained; run SFT with it, "
            "or take the scaling out for RL"
        )


def check_models(config: RunConfig, stage: Stage) -> None:
    """ValueError that names everything that is wrong with the folders that this stage reads."""
    by_folder: dict[tuple[str, Path], list[str]] = {}
    for key, folder, text in model_problems(config, stage):
        by_folder.setdefault((key, folder), []).append(text)
    if by_folder:
        parts = (f"{key} {folder} cannot be used: {'; '.join(lines)}" for (key, folder), lines in by_folder.items())
        raise ValueError("; ".join(parts))
