"""From a configuration to servers: which transport, which GPUs, started side by side and ready."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.rollout.banned import banned_token_ids
from megatron_r1reward.rollout.client import PolicyTokenizer
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.servers.build import common_folder, rollout_servers
from megatron_r1reward.servers.command import weight_transport
from megatron_r1reward.servers.component import ComponentServer
from megatron_r1reward.servers.member import Report
from megatron_r1reward.servers.process import VllmServer, start_servers
from megatron_r1reward.servers.sleep import SleepLevel
from megatron_r1reward.weight_sync.protocol import Transport
from megatron_r1reward.weight_sync.senders import GlooTransport, IpcTransport, NcclTransport

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
    components: Sequence[ComponentServer] = (),
    gpu_ids: Mapping[int, Sequence[int]] | None = None,
) -> RolloutPool:
    """Use `components` or the servers at `section.urls`, or start `section.count` of them; returns when all have
    completed a request.

    Args:
        components: servers that the supervisor of this life has started.
        model_path: HF folder of the policy.
        log_dir: server i writes to rollout-<i>.log in it.
        media_roots: folders that images must be in; none: text only. vLLM gets the one folder above all of them.
        pixels: (min, max) of the image processor (see `server_command`).
        takes_weights: False for a policy that does not change (evaluation).
        in_flight, sampled_log_probs: see `server_command`.
        gpu_ids: of started servers, by their number; see `rollout_server`.
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
    started: list[VllmServer] = []
    if not section.urls and not components:
        started = rollout_servers(
            section,
            model_path=policy_path,
            log_dir=log_dir,
            takes_weights=takes_weights,
            colocated=colocated,
            in_flight=in_flight,
            sampled_log_probs=sampled_log_probs,
            media_root=common_folder(media_roots),
            pixels=pixels,
            gpu_ids=gpu_ids,
        )
    transport = build_transport(section, colocated=colocated) if takes_weights else None
    try:
        start_servers(started, progress)
        pool = RolloutPool(
            section,
            urls=section.urls,
            tokenizer=tokenizer,
            banned_ids=banned_token_ids(policy_path),
            servers=components or started,
            transport=transport,
            media_roots=media_roots,
            status_file=status_file,
            sleep_level=sleep_level,
        )
    except BaseException:
        for server in started:
            server.close()
        raise
    try:
        pool.group.wait_until_ready()
    except BaseException:
        pool.close()
        raise
    return pool
