"""How a server of a stage is built, whoever starts it: a job step of its own or the process that asks it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1reward.config.schema import JudgeSection, ServerSection
from megatron_r1reward.config.server_sections import VllmSection
from megatron_r1reward.servers.command import weight_transport
from megatron_r1reward.servers.process import VllmServer

SERVED_NAME = "policy"


def rollout_server(
    section: ServerSection,
    index: int,
    *,
    model_path: Path,
    log_path: Path,
    takes_weights: bool,
    colocated: bool = False,
    served_name: str = SERVED_NAME,
    gpu_ids: Sequence[int] | None = None,
    **options: Any,
) -> VllmServer:
    """Rollout server `index` of `section.count`, not started.

    Args:
        model_path: the policy, unless the section names another folder.
        takes_weights: False for a policy that does not change (evaluation, annotation).
        colocated: on the trainer's GPUs, so it must be able to sleep.
        gpu_ids: among those that this process sees; (): all; None: its share of `section.gpu_ids`.
        options: further arguments of `VllmServer`.

    Raises:
        ValueError: `gpu_ids` are too few, or the folder is no checkpoint.
    """
    return VllmServer(
        section,
        model_path=section.model_path or model_path,
        log_path=log_path,
        served_name=served_name,
        gpu_ids=_share(section, index, "rollout") if gpu_ids is None else gpu_ids,
        weight_transfer=weight_transport(section, colocated=colocated) if takes_weights else None,
        sleep_mode=colocated,
        **options,
    )


def rollout_servers(
    section: ServerSection, *, log_dir: Path, gpu_ids: Mapping[int, Sequence[int]] | None = None, **options: Any
) -> list[VllmServer]:
    """All `section.count` of them, not started; number i writes to rollout-<i>.log in `log_dir`.

    Args:
        gpu_ids: by their number; for the others, and `options`, see `rollout_server`.

    Raises:
        ValueError: as `rollout_server`.
    """
    return [
        rollout_server(
            section,
            index,
            log_path=log_dir / f"rollout-{index}.log",
            gpu_ids=None if gpu_ids is None else gpu_ids.get(index),
            **options,
        )
        for index in range(section.count)
    ]


def judge_server(
    section: JudgeSection, index: int, *, log_path: Path, gpu_ids: Sequence[int] | None = None, **options: Any
) -> VllmServer:
    """Judge `index` of `section.count`, not started; `gpu_ids` as above.

    Raises:
        ValueError: no `judge.model_path`, `gpu_ids` are too few, or the folder is no checkpoint.
    """
    if section.model_path is None:
        raise ValueError("reward.use_judge is true: set judge.model_path or judge.urls, or reward.use_judge = false")
    return VllmServer(
        section,
        model_path=section.model_path,
        log_path=log_path,
        served_name=section.model or "judge",
        gpu_ids=_share(section, index, "judge") if gpu_ids is None else gpu_ids,
        **options,
    )


def common_folder(roots: Sequence[Path]) -> Path | None:
    """The deepest folder that holds all of these; vLLM takes one folder that images may come from."""
    return Path(os.path.commonpath([root.resolve() for root in roots])) if roots else None


def _share(section: VllmSection, index: int, kind: str) -> tuple[int, ...]:
    size = section.tensor_parallel_size
    if section.gpu_ids and len(section.gpu_ids) < section.count * size:
        raise ValueError(
            f"{kind}.gpu_ids names {len(section.gpu_ids)} GPUs, but {section.count} servers with tensor_parallel_size "
            f"{size} need {section.count * size}"
        )
    return section.gpu_ids[index * size : (index + 1) * size]
