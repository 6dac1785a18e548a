"""From a configuration to servers: which transport, which GPUs, started side by side and ready."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.rollout.banned import banned_token_ids
from megatron_r1reward.rollout.client import PolicyTokenizer
from megatron_r1reward.rollout.pool import SERVED_NAME, RolloutPool
from megatron_r1reward.servers.process import Report, VllmServer, start_servers
from megatron_r1reward.servers.server_devices import weight_transport
from megatron_r1reward.servers.sleep import SleepLevel
from megatron_r1reward.weight_sync.shared_memory_sender import IpcTransport
from megatron_r1reward.weight_sync.transport import Transport
from megatron_r1reward.weight_sync.weights_gloo import GlooTransport
from megatron_r1reward.weight_sync.weights_nccl import NcclTransport

log = logging.getLogger(__name__)


def build_transport(section: ServerSection, *, colocated: bool = False) -> Transport:
    """The trainer's end of the configured transport.

    Raises:
        ValueError: it needs a GPU and there is none, or cannot work there.
    """
    name = weight_transport(section, colocated=colocated)
    if name == "ipc":
        return IpcTransport()
    if name == "nccl":
        return NcclTransport(host=section.sender_host, timeout_s=section.push_timeout_s)
    return GlooTransport(
        host=section.sender_host, timeout_s=section.push_timeout_s, once_per_host=section.weights_once_per_host
    )


def build_servers(section: ServerSection, *, name: str, log_dir: Path, **options: Any) -> list[VllmServer]:
    """`section.count` servers, not started; server i logs to <name>-<i>.log and gets its share of `gpu_ids`.

    Args:
        options: further arguments of `VllmServer`.

    Raises:
        ValueError: `gpu_ids` are too few.
    """
    size = section.tensor_parallel_size
    if section.gpu_ids and len(section.gpu_ids) < section.count * size:
        raise ValueError(
            f"{name}.gpu_ids names {len(section.gpu_ids)} GPUs, but {section.count} servers with tensor_parallel_size "
            f"{size} need {section.count * size}"
        )
    return [
        VllmServer(
            section,
            log_path=log_dir / f"{name}-{index}.log",
            gpu_ids=section.gpu_ids[index * size : (index + 1) * size],
            **options,
        )
        for index in range(section.count)
    ]


def open_rollout_pool(
    section: ServerSection,
    *,
    model_path: Path,
    tokenizer: PolicyTokenizer,
    log_dir: Path,
    media_roots: Sequence[Path] = (),
    pixels: tuple[int, int] | None = None,
    takes_weights: bool = True,
    in_flight: bool = False,
    sampled_log_probs: bool = False,
    sleep_level: SleepLevel | None = None,
    status_file: Path | None = None,
    progress: Report | None = None,
) -> RolloutPool:
    """Use the servers at `section.urls`, or start `section.count` of them; returns when all have completed a request.

    Args:
        model_path: HF folder of the policy.
        log_dir: server i writes to rollout-<i>.log in it.
        media_roots: folders that images must be in; none: text only. vLLM gets the one folder above all of them.
        pixels: (min, max) of the image processor (see `server_command`).
        takes_weights: False for a policy that does not change (evaluation).
        in_flight, sampled_log_probs: see `server_command`.
        sleep_level: of servers on the trainer's devices, see `RolloutPool`.

    Raises:
        ServerError: a server did not start.
    """
    policy_path = section.model_path or model_path
    if section.urls and sampled_log_probs:
        log.warning(
            "sampling.temperature is not 1: the servers at rollout.urls must have been started with "
            "--logprobs-mode processed_logprobs, or their log-probs are not those of what they sample"
        )
    colocated = sleep_level is not None
    servers = []
    if not section.urls:
        servers = build_servers(
            section,
            name="rollout",
            log_dir=log_dir,
            model_path=policy_path,
            served_name=SERVED_NAME,
            weight_transfer=weight_transport(section, colocated=colocated) if takes_weights else None,
            sleep_mode=colocated,
            in_flight=in_flight,
            sampled_log_probs=sampled_log_probs,
            media_root=_common_folder(media_roots),
            pixels=pixels,
        )
    transport = build_transport(section, colocated=colocated) if takes_weights else None
    try:
        start_servers(servers, progress)
        pool = RolloutPool(
            section,
            urls=section.urls,
            tokenizer=tokenizer,
            banned_ids=banned_token_ids(policy_path),
            servers=servers,
            transport=transport,
            media_roots=media_roots,
            status_file=status_file,
            sleep_level=sleep_level,
        )
    except BaseException:
        for server in servers:
            server.close()
        raise
    try:
        pool.group.wait_until_ready()
    except BaseException:
        pool.close()
        raise
    return pool


def _common_folder(roots: Sequence[Path]) -> Path | None:
    return Path(os.path.commonpath([root.resolve() for root in roots])) if roots else None
