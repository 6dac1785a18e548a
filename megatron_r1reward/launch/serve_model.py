"""`r1reward serve`: a model folder or running servers behind the service, until SIGINT or SIGTERM."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvicorn

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.hub_name import local_folder
from megatron_r1reward.judging.ask import AskOptions
from megatron_r1reward.judging.reward_model import policy_of
from megatron_r1reward.judging.served import ServedModel, endpoints
from megatron_r1reward.network.tokens import is_loopback, token_from
from megatron_r1reward.servers.server_devices import sees_gpu
from megatron_r1reward.serving.cohorts import Policy
from megatron_r1reward.serving.other_trainers import add_routes, cohorts_of
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
) -> None:
    """Serve until told to stop; then finish what is in progress.

    Args:
        model: a Hugging Face folder, served here by `servers` vLLM servers, or URLs of running ones, comma-separated.
        concurrency: requests worked on at once; more hear 429.
        cohort_size, cohort_deadline_s, on_failure: of callers that send one sample at a time; see `CohortBuffer`.
        prompt_of: the folder that the servers at URLs serve, for what it says about its prompt.
        token_variable: environment variable with the token that clients must send.

    Raises:
        ValueError: the address is on the network and there is no token, or `model` is a run file or no model folder.
        ServerError: a server did not start, or does not answer.
    """
    token = token_from(token_variable)
    if token is None and not is_loopback(host) and not allow_anonymous:
        raise ValueError(
            f"--host {host} is on the network, and {token_variable} holds no token: set it, or give --allow-anonymous"
        )
    if model.endswith(".toml"):
        raise ValueError(f"{model} is a run file: rewards for known labels are `r1reward serve-labels {model}`")
    if prompt_of is not None and "://" not in model:
        raise ValueError(f"--prompt-of {prompt_of} is for servers at URLs: the folder {model} says its own prompt")
    options = AskOptions(max_tokens=max_tokens, concurrency=section.max_concurrency)
    with ExitStack() as stack:
        if "://" in model:
            policy = None if prompt_of is None else policy_of(prompt_of)
            served = endpoints(section, model.split(","), options=options, model=None, policy=policy)
        else:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reward-model-")))
            served = ServedModel.start(
                local_folder(model), section, count=servers, log_dir=logs, options=options, report=log.info
            )
        stack.callback(served.close)
        backend = Backend(model=served, loop=served.group.loop, ready=lambda: served.ready_servers > 0)
        limits = Limits(image_roots=tuple(root.resolve() for root in image_roots))
        service = RewardService(backend, limits, concurrency=concurrency, policy=served.policy)
        shown = host if ":" not in host else f"[{host}]"
        log.info(
            "serving %s: page and API at http://%s:%d/%s", model, shown, port, "?token=..." if token is not None else ""
        )
        app = build_app(service, token=token)
        add_routes(
            app, service, cohorts_of(service, size=cohort_size, deadline_s=cohort_deadline_s, on_failure=on_failure)
        )
        uvicorn.run(
            app,
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_DRAIN_S,
        )


def cpu_defaults() -> dict[str, Any]:
    """Keys of `ServerSection` that a CPU server needs to leave the machine some memory."""
    return {} if sees_gpu() else {"kv_cache_bytes": 1 << 30}
