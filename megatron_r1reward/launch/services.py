"""The servers that a stage needs beside it: started on this machine, or reached by URL."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch.paths import media_root
from megatron_r1reward.reward.consistency import ConsistencyJudge
from megatron_r1reward.rollout.pool import RolloutPool, open_rollout_pool
from megatron_r1reward.rollout.server import VllmServer, start_servers

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RlServices:
    """Rollout servers that take weights, and the judge (None when the reward does without)."""

    pool: RolloutPool
    judge: ConsistencyJudge | None


@contextmanager
def open_rl_services(config: RunConfig) -> Iterator[RlServices]:
    """Start (or connect to) rollout and judge servers side by side; all that was started is stopped at the end.

    Raises:
        ValueError: a judge is asked for, but neither judge.urls nor judge.model_path is set.
        ServerError: a server did not start.
    """
    judges = _judge_servers(config)
    try:
        for server in judges:
            server.start()
        with _open_pool(config, takes_weights=True) as pool:
            for server in judges:
                server.wait_ready(log.info)
            urls = config.judge.urls or tuple(server.url for server in judges)
            yield RlServices(pool=pool, judge=ConsistencyJudge(config.judge, urls) if config.reward.use_judge else None)
    finally:
        for server in judges:
            server.stop()


@contextmanager
def open_evaluation_pool(config: RunConfig) -> Iterator[RolloutPool]:
    """Rollout servers of `model.path` whose weights do not change."""
    with _open_pool(config, takes_weights=False) as pool:
        yield pool


@contextmanager
def open_annotator(config: RunConfig) -> Iterator[str]:
    """Base URL of the annotator: `annotate.url`, or `model.path` served here."""
    if config.annotate.url is not None:
        yield config.annotate.url
        return
    server = VllmServer(
        config.rollout,
        model_path=config.model.path,
        log_path=_log_dir(config) / "annotator.log",
        served_name=config.annotate.model,
        pixels=(config.data.min_pixels, config.data.max_pixels),
    )
    try:
        start_servers([server], log.info)
        yield f"{server.url}/v1"
    finally:
        server.stop()


def _judge_servers(config: RunConfig) -> list[VllmServer]:
    section = config.judge
    if not config.reward.use_judge or section.urls:
        return []
    if section.model_path is None:
        raise ValueError("reward.use_judge is true: set judge.model_path or judge.urls, or reward.use_judge = false")
    return [
        VllmServer(
            section,
            model_path=section.model_path,
            log_path=_log_dir(config) / f"judge-{index}.log",
            served_name=section.model or "judge",
        )
        for index in range(section.count)
    ]


def _open_pool(config: RunConfig, *, takes_weights: bool) -> RolloutPool:
    return open_rollout_pool(
        config.rollout,
        model_path=config.model.path,
        tokenizer=AutoTokenizer.from_pretrained(config.model.path, local_files_only=True),
        log_dir=_log_dir(config),
        media_root=media_root(config),
        pixels=(config.data.min_pixels, config.data.max_pixels),
        weight_transfer="gloo" if takes_weights else None,
        sender_host=config.rollout.sender_host,
        progress=log.info,
    )


def _log_dir(config: RunConfig) -> Path:
    return config.run.output_dir / "logs"
