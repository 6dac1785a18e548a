"""Names, ports and the interconnect."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_r1reward.doctor.finding import Finding, error, note, ok, warning

Resolve = Callable[[str], str]


def infiniband_ports(root: Path = Path("/sys/class/infiniband")) -> dict[str, tuple[str, str, str]]:
    """(state, rate, link layer) by `<device>/<port>`; empty where there is none."""
    ports = {}
    for port in sorted(root.glob("*/ports/*")) if root.is_dir() else []:
        values = tuple(_read(port / name) for name in ("state", "rate", "link_layer"))
        ports[f"{port.parent.parent.name}/{port.name}"] = (values[0], values[1], values[2])
    return ports


def check_interconnect(ports: Mapping[str, tuple[str, str, str]], *, with_gpus: bool) -> list[Finding]:
    active = {name: port for name, port in ports.items() if "ACTIVE" in port[0].upper()}
    if not ports:
        message = "no InfiniBand or RoCE device: nodes talk over TCP"
        if not with_gpus:
            return [note("network.interconnect", message)]
        fix = "fine on one node; for several, inside a container mount /dev/infiniband, or ask the site for RDMA nodes"
        return [warning("network.interconnect", message, fix)]
    if not active:
        fix = "ibstat shows the link; leave the node out (#SBATCH --exclude=...) and tell the site"
        return [error("network.interconnect", f"{len(ports)} InfiniBand ports, none is active", fix)]
    rates = ", ".join(sorted({f"{port[2]} {port[1]}" for port in active.values()}))
    findings = [ok("network.interconnect", f"{len(active)} of {len(ports)} ports active ({rates})")]
    if not Path("/dev/infiniband").is_dir():
        fix = "mount /dev/infiniband into the container (pyxis and enroot: MELLANOX_VISIBLE_DEVICES=all)"
        findings.append(error("network.verbs", "/dev/infiniband is not visible here: NCCL falls back to TCP", fix))
    return findings


def _interfaces(environment: Mapping[str, str], names: tuple[str, ...]) -> list[Finding]:
    """The interfaces that NCCL and gloo are told to use are there."""
    findings = []
    chosen = environment.get("NCCL_SOCKET_IFNAME")
    if chosen is not None and not _nccl_matches(chosen, names):
        findings.append(
            error(
                "network.NCCL_SOCKET_IFNAME",
                f"NCCL_SOCKET_IFNAME={chosen} matches none of this node's interfaces ({', '.join(names)})",
                "set it to a prefix that exists on every node, to ^docker,lo to exclude those, or unset it",
            )
        )
    gloo = environment.get("GLOO_SOCKET_IFNAME")
    if gloo is not None and not set(gloo.split(",")) <= set(names):
        findings.append(
            error(
                "network.GLOO_SOCKET_IFNAME",
                f"GLOO_SOCKET_IFNAME={gloo} is not among this node's interfaces ({', '.join(names)})",
                "gloo needs exact names, the same on every node; set one, or unset it",
            )
        )
    return findings


def check_variables(
    environment: Mapping[str, str] = os.environ,
    interfaces: tuple[str, ...] | None = None,
    *,
    active_infiniband: bool = False,
) -> list[Finding]:
    """NCCL's, gloo's and the allocator's settings name things that exist and do not contradict the machine."""
    names = interfaces if interfaces is not None else tuple(name for _, name in socket.if_nameindex())
    findings = _interfaces(environment, names)
    if environment.get("NCCL_IB_DISABLE", "0") == "1" and active_infiniband:
        findings.append(
            warning(
                "network.NCCL_IB_DISABLE",
                "NCCL_IB_DISABLE=1, but this node has active InfiniBand ports: several times slower between nodes",
                "unset NCCL_IB_DISABLE",
            )
        )
    if environment.get("NCCL_P2P_DISABLE", "0") == "1":
        findings.append(
            warning(
                "network.NCCL_P2P_DISABLE",
                "NCCL_P2P_DISABLE=1: GPUs of a node talk through main memory",
                "unset NCCL_P2P_DISABLE unless it was set against a hang on this hardware",
            )
        )
    allocator = environment.get("PYTORCH_CUDA_ALLOC_CONF", "") + environment.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:true" in allocator.lower().replace(" ", ""):
        findings.append(
            warning(
                "network.allocator",
                "expandable_segments is on: servers open the memory of CUDA IPC pushes (rollout.weight_transport "
                "'ipc') several times slower; vLLM's sleep mode turns it off for itself",
                "unset PYTORCH_CUDA_ALLOC_CONF, or push weights by 'nccl' or 'gloo'",
            )
        )
    proxies = [name for name in environment if name.lower() in ("http_proxy", "all_proxy") and environment[name]]
    if proxies and not (environment.get("no_proxy") or environment.get("NO_PROXY")):
        findings.append(
            warning(
                "network.proxy",
                f"{', '.join(sorted(proxies))} is set without no_proxy: requests to servers go through the proxy",
                "export no_proxy=localhost,127.0.0.1,.the.cluster.domain in the site file",
            )
        )
    return findings or [ok("network.variables", "no NCCL, gloo or proxy setting contradicts this node")]


def _nccl_matches(chosen: str, names: tuple[str, ...]) -> bool:
    """NCCL's rule: prefixes separated by commas; a leading = asks for whole names, a leading ^ excludes."""
    excludes, exact = chosen.startswith("^"), chosen.lstrip("^").startswith("=")
    parts = [part for part in chosen.lstrip("^=").split(",") if part]
    matching = [name for name in names if any(name == part if exact else name.startswith(part) for part in parts)]
    return len(matching) < len(names) if excludes else bool(matching)


def check_name(
    host: str | None = None, resolve: Resolve = socket.gethostbyname, *, several_nodes: bool = False
) -> Finding:
    """The host's own name leads to an address that other nodes can use."""
    host = host or socket.gethostname()
    fix = f"have the site give {host} its address in DNS or /etc/hosts (not 127.0.1.1), the same on every node"
    try:
        address = resolve(host)
    except OSError as problem:
        return (error if several_nodes else warning)("network.name", f"{host} does not resolve: {problem}", fix)
    # 127.0.0.1 and Debian's 127.0.1.1; other loopback addresses are deliberate.
    if several_nodes and ipaddress.ip_address(address) in (ipaddress.ip_address(a) for a in ("127.0.0.1", "127.0.1.1")):
        return error("network.name", f"{host} resolves to {address} here: other nodes would call themselves", fix)
    return ok("network.name", f"{host} is {address}")


def check_ports(
    environment: Mapping[str, str] = os.environ,
    range_file: Path = Path("/proc/sys/net/ipv4/ip_local_port_range"),
) -> list[Finding]:
    """Servers take ports of the kernel's choice; a fixed MASTER_PORT must be free and not one of those."""
    try:
        with socket.create_server(("", 0)):
            findings = [ok("network.ports", "a server can listen on a port of the kernel's choice")]
    except OSError as problem:
        fix = "the kernel has no free port: look for leaked servers with ss -ltnp, or ask for a node of your own"
        return [error("network.ports", f"no port can be opened: {problem}", fix)]
    fixed = environment.get("MASTER_PORT")
    if fixed is None or not fixed.isdigit():
        return findings
    low, high = (int(part) for part in range_file.read_text().split())
    if low <= int(fixed) <= high:
        findings.append(
            warning(
                "network.MASTER_PORT",
                f"MASTER_PORT={fixed} lies in the kernel's range for outgoing connections ({low} to {high})",
                f"another process may hold it when the job starts: choose one below {low}, or unset it",
            )
        )
    try:
        socket.create_server(("", int(fixed))).close()
    except OSError as problem:
        fix = "unset MASTER_PORT (the launcher picks a free one), or choose another"
        findings.append(error("network.MASTER_PORT", f"MASTER_PORT={fixed} cannot be used: {problem}", fix))
    return findings


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"
