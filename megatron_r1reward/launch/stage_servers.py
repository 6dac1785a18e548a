"""The servers that a stage needs beside it: components of its life (`components`), reached by URL, or, where there is
no supervisor (a launcher of the user's, `r1reward serve`, Python), children of this process. All three are looked after
by the same `servers.recovery`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_r1reward.cluster.placement import ServerKind, Stage, asks_judge, place_beside_ranks
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.stage_data import image_folders
from megatron_r1reward.evaluation.judged_votes import VoteJudge
from megatron_r1reward.hub_name import model_name
from megatron_r1reward.judging.ask import AskOptions
from megatron_r1reward.judging.served import ServedModel, ServedPointwise, ServedScalar, is_scalar, served_by
from megatron_r1reward.launch.addresses import components
from megatron_r1reward.model_folder.examine import load_tokenizer
from megatron_r1reward.model_folder.prompt_policy import PromptPolicy
from megatron_r1reward.network.tokens import TOKEN_VARIABLE, token_from
from megatron_r1reward.reward.consistency import ConsistencyJudge
from megatron_r1reward.reward.verdict_cache import VerdictCache
from megatron_r1reward.rollout.open_pool import open_rollout_pool
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.run_dir import RunDir
from megatron_r1reward.servers.build import SERVED_NAME as POLICY
from megatron_r1reward.servers.build import judge_server, rollout_server, rollout_servers
from megatron_r1reward.servers.component import ComponentServer
from megatron_r1reward.servers.group import ServerGroup
from megatron_r1reward.servers.process import VllmServer, start_servers

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RlServices:
    """Rollout servers that take weights, and the judge (None when the reward does without)."""

    pool: RolloutPool
    judge: ConsistencyJudge | None
    judge_servers: ServerGroup | None = None  # those that are ours to start again


@contextmanager
def open_rl_services(config: RunConfig, *, supervised: bool = False) -> Iterator[RlServices]:
    """Rollout servers and judge: those that the supervisor of this life runs, those at URLs, or else started here, side
    by side, and stopped at the end.

    Raises:
        ValueError: a judge is asked for, but neither judge.urls nor judge.model_path is set.
        ServerError: a server did not start.
    """
    with ExitStack() as stack:
        judges = _start_judges(config, "rl", stack) if config.reward.use_judge and not supervised else []
        pool = stack.enter_context(_open_pool(config, "rl", supervised))
        pool.sleep()  # colocated: the trainer builds its state now, and its first push wakes them
        judge, group = None, None
        if config.reward.use_judge:
            running = _components(config, "rl", "judge") if supervised else []
            judge, group = stack.enter_context(_open_judge(config, judges, running))
        yield RlServices(pool=pool, judge=judge, judge_servers=group)


@contextmanager
def open_judge(config: RunConfig) -> Iterator[ConsistencyJudge | None]:
    """The judge alone; None when the reward does without."""
    with ExitStack() as stack:
        if not config.reward.use_judge:
            yield None
            return
        yield stack.enter_context(_open_judge(config, _start_judges(config, "judge", stack), []))[0]


@contextmanager
def _open_judge(
    config: RunConfig, started: list[VllmServer], running: list[ComponentServer]
) -> Iterator[tuple[ConsistencyJudge, ServerGroup | None]]:
    section = config.judge
    cache = section.cache or config.run.output_dir / "judge-verdicts.sqlite"
    with closing(VerdictCache(cache)) as verdicts:
        if not started and not running:
            yield ConsistencyJudge(section, section.urls, cache=verdicts), None
            return
        for server in started:
            server.wait_ready(log.info)
        group = ServerGroup(
            section,
            name="judge",
            servers=running or started,
            served_name=section.model or "judge",
            status_file=RunDir(root=config.run.output_dir).servers("judge"),
        )
        with closing(group):
            yield ConsistencyJudge(section, group.endpoints, cache=verdicts), group


@contextmanager
def open_evaluation_pool(config: RunConfig, *, supervised: bool = False) -> Iterator[RolloutPool]:
    """Rollout servers of `model.path` whose weights do not change."""
    with _open_pool(config, "eval", supervised) as pool:
        yield pool


@contextmanager
def open_evaluation_alone(
    config: RunConfig, policy: PromptPolicy, *, supervised: bool = False
) -> Iterator[ServedScalar | ServedPointwise]:
    """`model.path`, which reads one response at a time and is asked by `policy`, behind those servers."""
    section = config.rollout
    name = None if section.urls else POLICY  # there the first that they list
    servers: list[VllmServer] = []
    if not supervised and not section.urls:
        servers = rollout_servers(
            section,
            model_path=config.model.path,
            log_dir=_log_dir(config),
            takes_weights=False,
            gpu_ids=_rollout_gpus(config, "eval"),
            pixels=(config.data.min_pixels, config.data.max_pixels),
        )
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.close)
        start_servers(servers, log.info)
        group = ServerGroup(
            section,
            name="rollout",
            urls=section.urls,
            servers=_components(config, "eval", "rollout") if supervised and not section.urls else servers,
            served_name=name,
            status_file=RunDir(root=config.run.output_dir).servers("rollout"),
            scalar=is_scalar(policy),
        )
        stack.callback(group.close)
        group.wait_until_ready()
        options = AskOptions(
            max_tokens=config.sampling.max_tokens,
            concurrency=section.max_concurrency,
            timeout_s=section.request_timeout_s,
        )
        served = served_by(group, model=name, options=options, policy=policy)
        assert not isinstance(served, ServedModel), "it compares"
        stack.callback(lambda: group.loop.run(served.aclose()))
        yield served


@contextmanager
def open_evaluation_judge(config: RunConfig, *, supervised: bool = False) -> Iterator[VoteJudge | str]:
    """The judge of an evaluation's judge-filtered votes, or why there are none."""
    if not asks_judge(config, "eval"):
        yield "evaluation.judge_filtered_votes is false"
        return
    section = config.judge.model_copy(update={"max_calls_per_step": None})  # there are no steps
    config = config.model_copy(update={"judge": section})
    with ExitStack() as stack:
        running = _components(config, "eval", "judge") if supervised else []
        started = [] if running else _start_judges(config, "eval", stack)
        judge, _ = stack.enter_context(_open_judge(config, started, running))
        folder = None if section.model_path is None else model_name(section.model_path)
        yield VoteJudge(judge=judge, name=section.model or folder or ", ".join(section.urls))


@contextmanager
def open_annotator(config: RunConfig, *, supervised: bool = False) -> Iterator[tuple[str, str]]:
    """Base URL and key of the annotator: `annotate.url`, or a server of `model.path`. Started again, that one is where
    it was, unless somebody has taken its port."""
    if config.annotate.url is not None:
        yield config.annotate.url, os.environ.get(config.annotate.api_key_variable, "none")
        return
    if supervised:
        (running,) = _components(config, "annotate", "rollout")
        status = RunDir(root=config.run.output_dir).servers("rollout")
        section, name = config.rollout, config.annotate.model
        with closing(ServerGroup(section, name="rollout", servers=[running], served_name=name, status_file=status)):
            yield f"{running.url}/v1", running.token or "none"
        return
    server = rollout_server(
        config.rollout,
        0,
        model_path=config.model.path,
        log_path=_log_dir(config) / "annotator.log",
        takes_weights=False,
        served_name=config.annotate.model,
        gpu_ids=place_beside_ranks(config, "annotate").get(("rollout", 0)),
        pixels=(config.data.min_pixels, config.data.max_pixels),
    )
    try:
        start_servers([server], log.info)
        yield f"{server.url}/v1", server.token
    finally:
        server.close()


def _start_judges(config: RunConfig, stage: Stage, stack: ExitStack) -> list[VllmServer]:
    """The judges of this process, starting; closed with `stack`. None where they are reached by URL."""
    if config.judge.urls:
        return []
    gpus = place_beside_ranks(config, stage)
    servers = []
    for index in range(config.judge.count):
        log_path = _log_dir(config) / f"judge-{index}.log"
        server = judge_server(config.judge, index, log_path=log_path, gpu_ids=gpus.get(("judge", index)))
        stack.callback(server.close)
        server.start()
        servers.append(server)
    return servers


def _components(config: RunConfig, stage: Stage, kind: ServerKind) -> list[ComponentServer]:
    return components(config, stage, kind, token=token_from(TOKEN_VARIABLE))


def _open_pool(config: RunConfig, stage: Stage, supervised: bool) -> RolloutPool:
    takes_weights = stage == "rl"
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
        status_file=RunDir(root=config.run.output_dir).servers("rollout"),
        progress=log.info,
        components=_components(config, stage, "rollout") if supervised else (),
        gpu_ids={} if supervised else _rollout_gpus(config, stage),
    )


def _rollout_gpus(config: RunConfig, stage: Stage) -> dict[int, tuple[int, ...]]:
    """Of rollout servers that this process starts itself, by their number."""
    return {index: ids for (kind, index), ids in place_beside_ranks(config, stage).items() if kind == "rollout"}


def _log_dir(config: RunConfig) -> Path:
    return config.run.output_dir / "logs"
