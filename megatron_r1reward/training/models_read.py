"""Which models a run reads again each time it starts, by what they are: a folder may hold another one under the same
path, and the same one may have moved."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from megatron_r1reward.checkpoint.manifest import hash_range
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.reward.terms import function_parts
from megatron_r1reward.user_parts import Part, names_a_function, read_part

log = logging.getLogger(__name__)

_MEANING = {
    "files": "configuration, tokenizer, processor or chat template of model.path",
    "reference": "the reference policy (weights of model.path, or checkpoint.init_from)",
    "critic files": "configuration, tokenizer or processor of critic.path",
    "rollout files": "configuration or tokenizer of rollout.model_path",
    "judge": "the judge",
    "template": "prompt.template",
    "parser": "prompt.parser",
}
_FUNCTION = "function of reward.terms "


def first_weights(config: RunConfig) -> str:
    """Identity of the policy that training begins with, which is also the reference policy."""
    first = config.checkpoint.init_from
    if first is None or not (manifest := first / "manifest.json").is_file():
        return model_identity(config.model.path)
    hashes = hash_range(manifest, 0, manifest.stat().st_size)  # a manifest holds the hashes of all tensors
    return f"{model_identity(config.model.path)} {hashes}"


def parts_read(config: RunConfig) -> dict[str, Part]:
    """The user's own texts and functions that a stage is made of, by kind.

    Raises:
        ValueError: a file cannot be read.
    """
    found = {}
    if config.prompt.template is not None:
        found["template"] = read_part("prompt.template", config.prompt.template)
    if config.prompt.parser is not None and names_a_function(config.prompt.parser):
        found["parser"] = read_part("prompt.parser", config.prompt.parser)
    return found | {_FUNCTION + name: part for name, part in function_parts(config.reward).items()}


def described_parts(config: RunConfig) -> dict[str, dict[str, str]]:
    """`parts_read` with their texts, for checkpoints and records."""
    return {kind: part.described() for kind, part in parts_read(config).items()}


def models_read(config: RunConfig, topology: Topology, *, rl: bool) -> dict[str, str]:
    """Kind of model (or of the user's part) -> identity; collective, the main rank reads. Weights that a checkpoint
    replaces do not count.

    Raises:
        ValueError: a folder or a file is missing.
    """
    return topology.decided_by_main(lambda: _read(config, rl))


def _read(config: RunConfig, rl: bool) -> dict[str, str]:
    found = {"files": model_identity(config.model.path, weights=False)}
    found |= {kind: part.identity for kind, part in parts_read(config).items()}
    if rl and config.algorithm.needs_reference:
        found["reference"] = first_weights(config)
    if rl and config.critic.path is not None:
        found["critic files"] = model_identity(config.critic.path, weights=False)
    if not rl or config.rl.replay is not None:
        return found
    if config.rollout.model_path is not None:
        found["rollout files"] = model_identity(config.rollout.model_path, weights=False)
    if config.reward.use_judge:
        from megatron_r1reward.reward.consistency import judge_identity  # openai loads for a second

        identity = judge_identity(config.judge)
        found["judge"] = "" if identity == " ".join(config.judge.urls) else identity  # no name: an address may change
    return found


def check_models_read(saved: Mapping[str, str] | None, now: Mapping[str, str], folder: Path, *, same: bool) -> None:
    """Compare what checkpoint `folder` was trained with.

    Raises:
        ValueError: a model is another one, and `same` (`checkpoint.same_models`) is true.
    """
    if saved is None:
        log.warning("%s is of an earlier version and does not say which models it was trained with", folder)
        return
    kinds = [*_MEANING, *sorted(kind for kind in saved.keys() | now.keys() if kind.startswith(_FUNCTION))]
    meaning = {kind: _MEANING.get(kind, f"the {kind}") for kind in kinds}
    changed = [meaning[kind] for kind in kinds if kind in saved and kind in now and saved[kind] != now[kind]]
    gone = [f"{meaning[kind]} was not used then" for kind in kinds if kind in now and kind not in saved]
    gone += [f"{meaning[kind]} is not used any more" for kind in kinds if kind in saved and kind not in now]
    if not changed and not gone:
        return
    text = "; ".join([f"{what} changed" for what in changed] + gone)
    if changed and same:
        raise ValueError(
            f"{folder} was trained with other models ({text}): restore them, or set checkpoint.same_models=false to go "
            "on with the new ones"
        )
    log.warning("%s was trained with other models (%s); going on with those of now", folder, text)
