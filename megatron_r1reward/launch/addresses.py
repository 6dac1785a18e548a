"""Where the servers of a supervised stage are: published by them in `live/`, read by supervisor and driver."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from megatron_r1reward.cluster.placement import ServerKind, Stage, asks_judge, servers_of
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.network.tokens import TOKEN_VARIABLE
from megatron_r1reward.run_dir import Address, RunDir
from megatron_r1reward.servers.component import ComponentServer


def node_address() -> str:
    """A name of this machine that the other nodes of the job resolve; the loopback address outside Slurm.

    Raises:
        ValueError: neither Slurm's name of the node nor its host name can be resolved.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return "127.0.0.1"
    names = [name for name in (os.environ.get("SLURMD_NODENAME"), socket.gethostname()) if name]
    for name in names:
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            continue
        return name
    raise ValueError(f"none of the names {names} of this node can be resolved: add it to DNS or to /etc/hosts")


def connected(config: RunConfig, stage: Stage) -> RunConfig:
    """The configuration with the addresses that only the supervised life knows. Rollout servers and judges that belong
    to it are not among them: `components` finds them, and where they are may change.

    Raises:
        ValueError: a shared judge is asked for that is not running, or rollout servers take weights in different ways.
    """
    judge = config.judge
    rollout = config.rollout.model_copy(update={"sender_host": node_address()} | _transport_of_servers(config))
    shared = config.cluster.shared_judge
    if asks_judge(config, stage) and not judge.urls and shared is not None:
        judge = judge.model_copy(update={"urls": shared_judge_urls(shared), "api_key_variable": TOKEN_VARIABLE})
    return config.model_copy(update={"rollout": rollout, "judge": judge})


def _transport_of_servers(config: RunConfig) -> dict[str, str]:
    """`auto` as the servers have resolved it: where the trainer sees GPUs and they do not, they would not meet."""
    addresses = RunDir(root=config.run.output_dir).addresses("rollout")
    resolved = {address.weight_transport: address.component for address in addresses if address.weight_transport}
    if len(resolved) > 1:
        ways = ", ".join(f"{component} {transport}" for transport, component in resolved.items())
        raise ValueError(
            f"rollout.weight_transport 'auto' is not the same on all servers ({ways}): their machines differ in GPUs. "
            "Name one that all can take, e.g. 'gloo'"
        )
    return {"weight_transport": next(iter(resolved))} if resolved else {}


def shared_judge_urls(root: Path) -> tuple[str, ...]:
    """Addresses of a judge job's servers.

    Raises:
        ValueError: it has not published any.
    """
    run = RunDir(root=root)
    if not run.addresses("judge") or run.exit_report.exists():
        raise ValueError(f"cluster.shared_judge {root}: no judge is running there; submit slurm/judge.sh first")
    return _urls(run, "judge")


def components(config: RunConfig, stage: Stage, kind: ServerKind, *, token: str | None) -> list[ComponentServer]:
    """The servers of one kind that the supervisor has started for this stage, in the order of their numbers."""
    run = RunDir(root=config.run.output_dir)
    section = config.judge if kind == "judge" else config.rollout
    count = servers_of(config, stage)[kind]
    return [ComponentServer(run, f"{kind}-{index}", section, token=token) for index in range(count)]


def _urls(run: RunDir, kind: ServerKind) -> tuple[str, ...]:
    addresses: list[Address] = run.addresses(kind)
    assert addresses, f"the supervisor starts the driver only after every {kind} server has published its address"
    return tuple(address.url for address in addresses)
