"""Which model folders a stage reads, and whether it can; which keys mean nothing to it: asked before a process starts
or anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from megatron_r1reward.cluster.placement import Stage, asks_judge
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.rows import check_source
from megatron_r1reward.data.stage_data import kind_of, template_of
from megatron_r1reward.model_folder.examine import folder_problems, served_problems
from megatron_r1reward.model_folder.prompt_policy import FILE, read_policy
from megatron_r1reward.model_folder.scalar_folder import is_scalar_folder
from megatron_r1reward.reward.readers import parser_of, reader_of
from megatron_r1reward.servers.command import model_corrections
from megatron_r1reward.user_parts import load_function, read_part

# A scalar reward model is trained by the others' run file, but for these: it samples nothing, sees one response at a
# time, and has no LM head.
_NOT_FOR_RM = (
    *(
        "sft",
        "rl",
        "asynchrony",
        "algorithm",
        "critic",
        "health",
        "reward",
        "sampling",
        "rollout",
        "judge",
        "annotate",
        "prompt",
    ),
    *("data.swap", "precision.kernels", "precision.logits"),
)
_MEANINGLESS: dict[Stage, tuple[str, ...]] = {
    "rm": _NOT_FOR_RM,
    "sft": ("reward_model", "critic"),
    "rl": ("reward_model",),
}


def check_keys(config: RunConfig, stage: Stage) -> None:
    """ValueError where a key of another stage is set to something else than its default."""
    defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
    found = []
    for key in _MEANINGLESS.get(stage, ()):
        section, _, name = key.partition(".")
        given = getattr(config, section)
        if not name and given != defaults[section]:
            changed = [
                one for one in type(given).model_fields if getattr(given, one) != getattr(defaults[section], one)
            ]
            found += [f"{section}.{one}" for one in changed]
        elif name and getattr(given, name) != type(given).model_fields[name].default:
            found.append(key)
    if found:
        raise ValueError(f"{', '.join(found)} mean nothing to `r1reward {stage}`: remove them from its run file")


def check_settings(config: RunConfig, stage: Stage) -> None:
    """ValueError where a stage would find out, once its servers are there, that its samples cannot be drawn as set, or
    its rows not be selected."""
    if stage != "sft":  # whose rows may say it themselves
        config.data.check_attempts()
    if stage == "rl":
        config.sampling.check_for_rl()
        if config.rl.pairing != "pointwise" and kind_of(config) == "pointwise":
            raise ValueError(
                f"rl.pairing {config.rl.pairing!r} compares two responses, and the model in {config.model.path} (or "
                "prompt.kind) rates one: set it to 'pointwise', or prompt.kind to 'generative'"
            )
        key, samples = "algorithm.samples_per_prompt", config.algorithm.samples_per_prompt
        if config.rl.replay is not None:
            return
    elif stage == "eval":
        kind = "scalar" if is_scalar_folder(config.model.path) else kind_of(config)
        if kind != "generative":
            if config.evaluation.judge_filtered_votes:
                raise ValueError(
                    f"evaluation.judge_filtered_votes: the {kind} reward model in {config.model.path} writes no "
                    "reasoning about a pair that a judge could read: set it to false"
                )
            return
        key, samples = "evaluation.samples", config.evaluation.samples
        if too_large := [k for k in config.evaluation.voting if k > samples]:
            raise ValueError(f"evaluation.voting {too_large} is more than evaluation.samples {samples}: change one")
        if samples > 1 and config.sampling.temperature == 0:
            raise ValueError(
                f"sampling.temperature 0 draws {samples} equal samples: raise it, or set evaluation.samples and "
                "evaluation.voting to 1"
            )
    else:
        return
    if not config.rollout.urls and samples > config.rollout.max_num_seqs:
        raise ValueError(
            f"{key} {samples} is more than rollout.max_num_seqs {config.rollout.max_num_seqs}, what a server samples "
            "at a time: raise the latter"
        )


def model_problems(config: RunConfig, stage: Stage) -> Iterator[tuple[str, Path, str]]:
    """(key of the run file, folder, what is wrong) for all that is wrong with the folders that this stage reads."""
    path = config.model.path
    if stage in ("sft", "rm", "rl"):
        # Servers that are started here load the folder's weights, whatever the trainer begins with.
        serves = stage == "rl" and not config.rollout.urls and config.rl.replay is None
        weights = config.checkpoint.init_from is None or serves
        found = folder_problems(path, weights=weights, scalar=stage == "rm")
        yield from (("model.path", path, text) for text in found)
        if (first := config.checkpoint.init_from) is not None:
            yield from (("checkpoint.init_from", first, text) for text in _checkpoint_problems(first))
        if serves:
            yield from (("model.path", path, text) for text in _serving_problems(path, config))
        if stage == "rl" and (critic := config.critic.path) is not None:
            yield from (("critic.path", critic, text) for text in folder_problems(critic, scalar=True))
    elif stage == "eval":
        weights = not config.rollout.urls
        found = folder_problems(path, weights=weights, trainable=False, scalar=True)
        yield from (("model.path", path, text) for text in found)
        yield from (("model.path", path, text) for text in _asked_otherwise(config))
        if weights:
            yield from (("model.path", path, text) for text in _serving_problems(path, config))
    elif stage == "serve":
        path = config.rollout.model_path or path
        if not config.rollout.urls:
            yield from (("model.path", path, text) for text in served_problems(path, scalar=True))
    if stage in ("sft", "rl", "eval"):
        yield from _part_problems(config, stage)
    if stage == "annotate" and config.annotate.url is None:
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

    template, parser = config.prompt.template, config.prompt.parser
    if policy is not None and policy.kind == "scalar":
        if template is not None or parser is not None:
            yield "it is a scalar reward model, to which [prompt] means nothing: remove the section"
        return
    if policy is not None and policy.kind != kind_of(config):
        yield f"its {FILE} says kind {policy.kind!r}, and prompt.kind or rl.pairing {kind_of(config)!r}: remove it"
        return
    if any(_part_problems(config, "eval")):
        return  # said there
    if policy is not None and template is not None and template_of(config) != policy.template:
        yield f"its {FILE} has the prompt of its training, and prompt.template {template} is another: remove it"
    if policy is not None and parser is not None and parser_of(config) != policy.parser:
        said = "<answer>1</answer>" if policy.parser is None else policy.parser.name
        yield f"its {FILE} says that verdicts are read by {said}, and prompt.parser {parser!r} is another: remove it"


def _part_problems(config: RunConfig, stage: Stage) -> Iterator[tuple[str, Path, str]]:
    """What is wrong with the user's own prompt, parser and reward functions."""
    try:
        read_policy(config.model.path)
    except ValueError:
        return  # whoever reads it says so
    checks: list[tuple[str, str | Path | None, Callable[[], object]]] = [
        ("prompt.template", config.prompt.template, lambda: template_of(config))
    ]
    if stage != "sft":
        checks.append(("prompt.parser", config.prompt.parser, lambda: reader_of(config)))
    if stage == "rl" and config.rl.replay is None:
        checks += [
            (f"reward.terms {term.name!r}", term.function, partial(_load, term.name, term.function))
            for term in config.reward.all_terms
            if term.function is not None
        ]
    for key, name, check in checks:
        try:
            check()
        except ValueError as error:
            reason = str(error).removeprefix(f"{key} {str(name)!r}: ")
            yield (key, Path(name), reason) if name is not None else ("model.path", config.model.path, reason)


def _load(term: str, function: str) -> None:
    load_function(read_part(f"reward.terms {term!r}", function))


def _checkpoint_problems(folder: Path) -> Iterator[str]:
    """What keeps a folder from giving a model its first weights; hashes are compared when they are read."""
    steps = sorted(path.name for path in folder.glob("step-*") if path.is_dir())
    if not folder.is_dir():
        yield "there is no such folder: name what `r1reward convert import` wrote, or a step folder of a run"
        return
    from megatron_r1reward.checkpoint.manifest import MANIFEST, find_damage  # megatron-core loads for seconds

    if steps and not (folder / MANIFEST).is_file():
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
    """ValueError that names everything that is wrong with the folders that this stage reads and what keeps its rows
    from being read, or keys that mean nothing to it."""
    check_keys(config, stage)
    check_settings(config, stage)
    parts = list(_data_problems(config, stage))
    by_folder: dict[tuple[str, Path], list[str]] = {}
    for key, folder, text in model_problems(config, stage):
        by_folder.setdefault((key, folder), []).append(text)
    parts += [f"{key} {folder} cannot be used: {'; '.join(lines)}" for (key, folder), lines in by_folder.items()]
    if parts:
        raise ValueError("; ".join(parts))


def _data_problems(config: RunConfig, stage: Stage) -> Iterator[str]:
    """What keeps the files of rows from being read at all. Mounts of a container may lead to them, which this process
    is not in: then the stage finds out."""
    if config.cluster.container_image is not None:
        return
    reads = {"data.train": config.data.train} if stage in ("sft", "rm", "rl", "annotate") else {}
    probed = (stage == "rl" and config.rl.heldout_every) or (stage == "rm" and config.reward_model.heldout_every)
    if (stage == "eval" or probed) and config.evaluation.data is not None:  # else the reader says that it is not set
        reads["evaluation.data"] = config.evaluation.data
    if stage == "rl" and config.rl.replay is not None:
        reads.pop("data.train")
    for key, path in reads.items():
        try:
            check_source(path)
        except (ValueError, OSError) as error:
            yield f"{key} cannot be used: {error}"
