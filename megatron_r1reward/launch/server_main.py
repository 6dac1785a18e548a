"""One rollout or judge server as a job step: starts vLLM on this node, publishes its address, stays until it ends."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType

from megatron_r1reward.cluster.placement import ServerKind, Stage
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch.addresses import node_address
from megatron_r1reward.launch.paths import media_root
from megatron_r1reward.launch.steps import code_of, name_of
from megatron_r1reward.network.tokens import TOKEN_VARIABLE, token_from
from megatron_r1reward.run_dir import Address, RunDir
from megatron_r1reward.servers.process import ServerError, VllmServer
from megatron_r1reward.servers.server_devices import weight_transport

log = logging.getLogger(__name__)
_POLL_INTERVAL_S = 0.2


class _ToldToEndError(Exception):
    """SIGTERM."""


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the clean-up
    raise _ToldToEndError


def serve(config: RunConfig, stage: Stage, kind: ServerKind, index: int, *, life: int) -> int:
    """Run server `index` of its kind until SIGTERM (returns 0) or its death (returns its exit code, never 0)."""
    run = RunDir(root=config.run.output_dir)
    name = f"{kind}-{index}"
    signal.signal(signal.SIGTERM, _end)
    log.info(
        "%s on %s, CUDA_VISIBLE_DEVICES=%s", name, node_address(), os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    )
    server = None
    try:
        server = _server(config, stage, kind, run, life, name)
        server.start()
        server.wait_ready(log.info)
        address = Address(
            component=name, url=server.url, served_name=server.served_name, host=node_address(), ready_at=time.time()
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


def _server(config: RunConfig, stage: Stage, kind: ServerKind, run: RunDir, life: int, name: str) -> VllmServer:
    log_path = run.log(life, f"{name}.vllm")
    token = token_from(TOKEN_VARIABLE)  # the supervisor's, so that the driver knows it
    if kind == "judge":
        path = config.judge.model_path
        assert path is not None, "checked when components were placed"
        return VllmServer(
            config.judge,
            model_path=path,
            log_path=log_path,
            served_name=config.judge.model or "judge",
            host=node_address(),
            token=token,
        )
    colocated = stage == "rl" and config.cluster.layout == "colocated"
    return VllmServer(
        config.rollout,
        model_path=config.rollout.model_path or config.model.path,
        log_path=log_path,
        served_name=config.annotate.model if stage == "annotate" else "policy",
        host=node_address(),
        token=token,
        weight_transfer=weight_transport(config.rollout, colocated=colocated) if stage == "rl" else None,
        sleep_mode=colocated,
        in_flight=stage == "rl" and config.asynchrony.mode == "in_flight",
        sampled_log_probs=stage == "rl" and config.sampling.tempered,
        media_root=media_root(config),
        pixels=(config.data.min_pixels, config.data.max_pixels),
    )
