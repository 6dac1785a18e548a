"""A service until SIGINT or SIGTERM: a model (`r1reward serve`, and the driver of `r1reward launch serve`), or known
labels in the protocol of the original code base (`r1reward serve-labels`)."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from megatron_r1reward.config.schema import RunConfig, ServerSection
from megatron_r1reward.hub_name import local_folder
from megatron_r1reward.judging.ask import AskOptions
from megatron_r1reward.judging.served import (
    AnyServed,
    endpoints,
    is_scalar,
    policy_of,
    serve_folder,
    served_by,
)
from megatron_r1reward.launch.addresses import components, node_address
from megatron_r1reward.launch.stage_models import check_models
from megatron_r1reward.launch.stage_servers import open_judge
from megatron_r1reward.network.tokens import TOKEN_VARIABLE, is_loopback, token_from
from megatron_r1reward.run_dir import Address, RunDir
from megatron_r1reward.servers.build import SERVED_NAME as POLICY
from megatron_r1reward.servers.command import sees_gpu
from megatron_r1reward.servers.group import ServerGroup
from megatron_r1reward.serving.cohorts import Policy
from megatron_r1reward.serving.other_trainers import add_routes, cohorts_of
from megatron_r1reward.serving.remote_reward import ROUTE, LabelTable, RemoteReward, reward_app
from megatron_r1reward.serving.service import Backend, RewardService, build_app
from megatron_r1reward.serving.wire import Limits

log = logging.getLogger(__name__)
_DRAIN_S = 600  # what is in progress may finish


def serve_model(
    model: str,
    *,
    host: str,
    port: int,
    servers: int,
    concurrency: int,
    image_roots: Sequence[Path],
    token_variable: str,
    allow_anonymous: bool,
    max_tokens: int,
    section: ServerSection,
    cohort_size: int,
    cohort_deadline_s: float,
    on_failure: Policy,
    prompt_of: Path | None = None,
    trust_parser: bool = False,
) -> None:
    """Serve until told to stop; then finish what is in progress.

    Args:
        model: a Hugging Face folder, served here by `servers` vLLM servers, or URLs of running ones, comma-separated.
        concurrency: requests worked on at once; more hear 429.
        cohort_size, cohort_deadline_s, on_failure: of callers that send one sample at a time; see `CohortBuffer`.
        prompt_of: the folder that the servers at URLs serve, for what it says about its prompt.
        token_variable: environment variable with the token that clients must send.
        trust_parser: run the code that the model's folder carries for reading its verdicts.

    Raises:
        ValueError: the address is on the network and there is no token, or `model` is a run file or no model folder.
        ServerError: a server did not start, or does not answer.
    """
    token = _token(token_variable, host, allow_anonymous, "--host")
    if model.endswith(".toml"):
        raise ValueError(f"{model} is a run file: rewards for known labels are `r1reward serve-labels {model}`")
    if prompt_of is not None and "://" not in model:
        raise ValueError(f"--prompt-of {prompt_of} is for servers at URLs: the folder {model} says its own prompt")
    options = AskOptions(max_tokens=max_tokens, concurrency=section.max_concurrency, trust_parser=trust_parser)
    with ExitStack() as stack:
        if "://" in model:
            policy = None if prompt_of is None else policy_of(prompt_of)
            served = endpoints(section, model.split(","), options=options, model=None, policy=policy)
        else:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reward-model-")))
            served = serve_folder(
                local_folder(model), section, count=servers, log_dir=logs, options=options, report=log.info
            )
        stack.callback(served.close)
        offer = _Offer(
            limits=Limits(image_roots=tuple(root.resolve() for root in image_roots)),
            concurrency=concurrency,
            cohort_size=cohort_size,
            cohort_deadline_s=cohort_deadline_s,
            on_failure=on_failure,
        )
        _run(served, offer, what=model, host=host, port=port, token=token)


def serve_stage(config: RunConfig) -> None:
    """The driver of a supervised life: the service before the servers that the supervisor runs, or those at
    rollout.urls. Its address is in `live/serve.address.json`.

    Raises:
        ValueError: the address is on the network and there is no token.
    """
    section, run = config.serve, RunDir(root=config.run.output_dir)
    token = _token(section.token_variable, section.host, section.allow_anonymous, "serve.host")
    folder = config.rollout.model_path or config.model.path
    options = AskOptions(
        max_tokens=config.sampling.max_tokens,
        concurrency=config.rollout.max_concurrency,
        trust_parser=config.prompt.trust_parser,
    )
    if "SLURM_JOB_ID" in os.environ and is_loopback(section.host):
        log.warning("serve.host %s: only programs on this node reach it; 0.0.0.0 is all of its network", section.host)
    policy = policy_of(folder)
    if config.rollout.urls:
        served = endpoints(config.rollout, config.rollout.urls, options=options, model=None, policy=policy)
    else:
        servers = components(config, "serve", "rollout", token=token_from(TOKEN_VARIABLE))
        status = run.servers("rollout")
        group = ServerGroup(
            config.rollout,
            name="rollout",
            servers=servers,
            served_name=POLICY,
            status_file=status,
            scalar=is_scalar(policy),
        )
        served = served_by(group, model=POLICY, options=options, policy=policy)
    offer = _Offer(
        limits=Limits(image_roots=tuple(root.resolve() for root in section.image_roots)),
        concurrency=section.concurrency,
        cohort_size=section.cohort_size,
        cohort_deadline_s=section.cohort_deadline_s,
        on_failure=section.on_failure,
    )
    with closing(served):
        _run(served, offer, what=str(folder), host=section.host, port=section.port, token=token, run=run)


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """What the service takes on."""

    limits: Limits
    concurrency: int
    cohort_size: int
    cohort_deadline_s: float
    on_failure: Policy


def _run(
    served: AnyServed,
    offer: _Offer,
    *,
    what: str,
    host: str,
    port: int,
    token: str | None,
    run: RunDir | None = None,
) -> None:
    """Until SIGINT or SIGTERM, and until what was in progress then is finished. `run`: where to leave the address."""
    backend = Backend(
        model=served, loop=served.group.loop, ready=lambda: served.ready_servers > 0, servers=served.group.status
    )
    service = RewardService(backend, offer.limits, concurrency=offer.concurrency, policy=served.policy)
    app = build_app(service, token=token)
    buffer = cohorts_of(
        service, size=offer.cohort_size, deadline_s=offer.cohort_deadline_s, on_failure=offer.on_failure
    )
    add_routes(app, service, buffer)
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        port = listening.getsockname()[1]
        name = node_address() if run is not None and not is_loopback(host) else host
        url = f"http://{name if ':' not in name else f'[{name}]'}:{port}"
        log.info("serving %s: page and API at %s/%s", what, url, "?token=..." if token is not None else "")
        if run is not None:
            here = Address(component="serve", url=url, served_name=what, host=name, ready_at=time.time())
            here.write(run.address("serve"))
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_DRAIN_S)
        # Having finished its work, uvicorn gives the signal on; here, too, it must not skip the clean-up.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, before)
            if run is not None:
                run.address("serve").unlink(missing_ok=True)


def _token(variable: str, host: str, allow_anonymous: bool, key: str) -> str | None:
    token = token_from(variable)
    if token is None and not is_loopback(host) and not allow_anonymous:
        allow = "serve.allow_anonymous = true" if key == "serve.host" else "--allow-anonymous"
        raise ValueError(f"{key} {host} is on the network, and {variable} holds no token: set it, or give {allow}")
    return token


def cpu_defaults() -> dict[str, Any]:
    """Keys of `ServerSection` that a CPU server needs to leave the machine some memory."""
    return {} if sees_gpu() else {"kv_cache_bytes": 1 << 30}


def serve_labels(config: RunConfig) -> None:
    """The reward of this package for people who train with the original code base: labels come from `data.train`, the
    judge from [judge].

    Raises:
        ValueError: the address is on the network and there is no token, or the data has no labels.
    """
    section = config.serve
    check_models(config, "judge")
    token = _token(section.token_variable, section.host, section.allow_anonymous, "serve.host")
    labels = LabelTable(config.data.train)
    log.info(
        "%d labels (%d rows without, %d messages with two answers)", len(labels), labels.skipped, len(labels.ambiguous)
    )
    with open_judge(config) as judge:
        app = reward_app(RemoteReward(config.reward, labels, judge), token=token)
        log.info("POST http://%s:%d%s", section.host, section.port, ROUTE)
        uvicorn.run(app, host=section.host, port=section.port, log_level="warning", access_log=False)
