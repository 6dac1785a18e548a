"""The servers that a stage needs beside it: started on this machine, or reached by URL."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.stage_data import image_folders
from megatron_r1reward.model_folder.examine import load_tokenizer
from megatron_r1reward.reward.consistency import ConsistencyJudge
from megatron_r1reward.reward.verdict_cache import VerdictCache
from megatron_r1reward.rollout.open_pool import build_servers, open_rollout_pool
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.servers.group import ServerGroup
from megatron_r1reward.servers.process import VllmServer, start_servers

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RlServices:
    """Rollout servers that take weights, and the judge (None when the reward does without)."""

    pool: RolloutPool
    judge: ConsistencyJudge | None
    judge_servers: ServerGroup | None = None  # those that were started here


@contextmanager
def open_rl_services(config: RunConfig) -> Iterator[RlServices]:
    """Start (or connect to) rollout and judge servers side by side; all that was started is stopped at the end.

    Raises:
        ValueError: a judge is asked for, but neither judge.urls nor judge.model_path is set.
        ServerError: a server did not start.
    """
    with ExitStack() as stack:
        judges = _judge_servers(config)
        for server in judges:
            stack.callback(server.close)
            server.start()
        pool = stack.enter_context(_open_pool(config, takes_weights=True))
        pool.sleep()  # colocated: the trainer builds its state now, and its first push wakes them
        judge, group = stack.enter_context(_open_judge(config, judges)) if config.reward.use_judge else (None, None)
        yield RlServices(pool=pool, judge=judge, judge_servers=group)


@contextmanager
def open_judge(config: RunConfig) -> Iterator[ConsistencyJudge | None]:
    """The judge alone; None when the reward does without."""
    with ExitStack() as stack:
        judges = _judge_servers(config)
        for server in judges:
            stack.callback(server.close)
            server.start()
        yield stack.enter_context(_open_judge(config, judges))[0] if config.reward.use_judge else None


@contextmanager
def _open_judge(config: RunConfig, servers: list[VllmServer]) -> Iterator[tuple[ConsistencyJudge, ServerGroup | None]]:
    section = config.judge
    cache = section.cache or config.run.output_dir / "judge-verdicts.sqlite"
    with closing(VerdictCache(cache)) as verdicts:
        if section.urls:
            yield ConsistencyJudge(section, section.urls, cache=verdicts), None
            return
        for server in servers:
            server.wait_ready(log.info)
        group = ServerGroup(
            section,
            name="judge",
            servers=servers,
            served_name=section.model or "judge",
            status_file=_live_dir(config) / "judge-servers.json",
        )
        with closing(group):
            yield ConsistencyJudge(section, group.endpoints, cache=verdicts), group


@contextmanager
def open_evaluation_pool(config: RunConfig) -> Iterator[RolloutPool]:
    """Rollout servers of `model.path` whose weights do not change."""
    with _open_pool(config, takes_weights=False) as pool:
        yield pool


@contextmanager
def open_annotator(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Base URL and key of the annotator: `annotate.url`, or `model.path` served here."""
    if config.annotate.url is not None:
        yield config.annotate.url, os.environ.get(config.annotate.api_key_variable, "none")
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
        yield f"{server.url}/v1", server.token
    finally:
        server.close()


def _judge_servers(config: RunConfig) -> list[VllmServer]:
    section = config.judge
    if not config.reward.use_judge or section.urls:
        return []
    if section.model_path is None:
        raise ValueError("reward.use_judge is true: set judge.model_path or judge.urls, or reward.use_judge = false")
    return build_servers(
        section,
        name="judge",
        log_dir=_log_dir(config),
        model_path=section.model_path,
        served_name=section.model or "judge",
    )


def _open_pool(config: RunConfig, *, takes_weights: bool) -> RolloutPool:
    return open_rollout_pool(
        config.rollout,
        model_path=config.model.path,
        tokenizer=load_tokenizer(config.model.path),
        log_dir=_log_dir(config),
        media_roots=image_folders(config),
        pixels=(config.data.min_pixels, config.data.max_pixels),
        takes_weights=takes_weights,
        in_flight=takes_weights and config.asynchrony.mode == "in_flight",
        sampled_log_probs=takes_weights and config.sampling.tempered,
        sleep_level=config.cluster.sleep_level if takes_weights and config.cluster.layout == "colocated" else None,
        status_file=_live_dir(config) / "rollout-servers.json",
        progress=log.info,
    )


def _log_dir(config: RunConfig) -> Path:
    return config.run.output_dir / "logs"


def _live_dir(config: RunConfig) -> Path:
    return config.run.output_dir / "live"
