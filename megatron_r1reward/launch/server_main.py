"""One rollout or judge server as a job step: starts vLLM on this node, publishes its address, stays until it ends."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

from megatron_r1reward.cluster.placement import ServerKind, Stage
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.stage_data import image_folders
from megatron_r1reward.launch.addresses import node_address
from megatron_r1reward.launch.steps import code_of, name_of
from megatron_r1reward.model_folder.prompt_policy import read_policy
from megatron_r1reward.network.tokens import TOKEN_VARIABLE, token_from
from megatron_r1reward.run_dir import Address, RunDir
from megatron_r1reward.servers.build import SERVED_NAME, common_folder, judge_server, rollout_server
from megatron_r1reward.servers.member import ServerError
from megatron_r1reward.servers.process import VllmServer

log = logging.getLogger(__name__)
_POLL_INTERVAL_S = 0.2


class _ToldToEndError(Exception):
    """SIGTERM."""


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the clean-up
    raise _ToldToEndError


def serve(config: RunConfig, stage: Stage, kind: ServerKind, index: int, *, life: int, start: int) -> int:
    """Run server `index` of its kind until SIGTERM (returns 0) or its death (returns its exit code, never 0).

    Args:
        start: how often it was started in this life before. It is then where it was, if its port is free.
    """
    run = RunDir(root=config.run.output_dir)
    name = f"{kind}-{index}"
    signal.signal(signal.SIGTERM, _end)
    log.info(
        "%s on %s, CUDA_VISIBLE_DEVICES=%s", name, node_address(), os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    )
    server = None
    try:
        earlier = Address.read(run.address(name)) if start else None
        port = (urlsplit(earlier.url).port or 0) if earlier is not None and earlier.host == node_address() else 0
        server = _server(config, stage, kind, index, run.log(life, f"{name}.vllm"), port)
        server.start()
        server.wait_ready(log.info)
        address = Address(
            component=name,
            url=server.url,
            served_name=server.served_name,
            host=node_address(),
            ready_at=time.time(),
            start=start,
            weight_transport=server.weight_transfer,
        )
        address.write(run.address(name))
        while server.alive:
            time.sleep(_POLL_INTERVAL_S)
        server.check_alive()  # raises
    except _ToldToEndError:
        log.info("%s: told to end", name)
        return 0
    except ServerError as error:
        log.error("%s", error)
        return _death(server)
    finally:
        if server is not None:
            server.stop()
    raise AssertionError("a server that is not alive raises")


def _death(server: VllmServer | None) -> int:
    """The dead server's exit code; 1 where it is still there (start-up time-out) or claims to be well."""
    code = code_of((server.returncode if server is not None else None) or 1)
    log.error("the vLLM server %s", name_of(code))
    return code


def _server(config: RunConfig, stage: Stage, kind: ServerKind, index: int, log_path: Path, port: int) -> VllmServer:
    host = node_address()
    token = token_from(TOKEN_VARIABLE)  # the supervisor's, so that the driver knows it
    if kind == "judge":
        return judge_server(config.judge, index, log_path=log_path, gpu_ids=(), host=host, token=token, port=port)
    return rollout_server(
        config.rollout,
        index,
        model_path=config.model.path,
        log_path=log_path,
        gpu_ids=(),  # the step sees its own only
        takes_weights=stage == "rl",
        colocated=stage == "rl" and config.cluster.layout == "colocated",
        served_name=config.annotate.model if stage == "annotate" else SERVED_NAME,
        in_flight=stage == "rl" and config.asynchrony.mode == "in_flight",
        sampled_log_probs=stage == "rl" and config.sampling.tempered,
        # Only rollouts name images as files; annotations and the service send them along.
        media_root=common_folder(image_folders(config)) if stage in ("rl", "eval") else None,
        pixels=_pixels(config, stage),
        host=host,
        token=token,
        port=port,
    )


def _pixels(config: RunConfig, stage: Stage) -> tuple[int, int]:
    """A served reward model says itself which image sizes it was trained with."""
    policy = read_policy(config.rollout.model_path or config.model.path) if stage == "serve" else None
    return (policy and policy.pixels) or (config.data.min_pixels, config.data.max_pixels)
