"""Every node of a job: the checks that need no controller run on each, and the nodes are compared.

The doctor starts `python -m megatron_r1reward.doctor.nodes FOLDER CANARY HOST:PORT` once per node; each prints
its report as JSON, cut into short lines: srun mixes the output of tasks, but never within a short line.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_r1reward.cluster import commands
from megatron_r1reward.cluster.step_environment import clean_environment
from megatron_r1reward.doctor import machine, network, packages, storage
from megatron_r1reward.doctor.finding import Finding, error, merge_nodes, ok, warning

_TIMEOUT_S = 300.0
_CANARY_PATIENCE_S = 30.0  # attribute caches of network file systems live that long
_MARK = "r1reward-node-report"
_LINE_LENGTH = 500
_SKEW_S = 2.0


def gpus_expected(environment: Mapping[str, str]) -> bool:
    """Slurm gave this process GPUs."""
    return "SLURM_JOB_ID" in environment and bool(environment.get("CUDA_VISIBLE_DEVICES"))


def check_node(*, several_nodes: bool = False) -> list[Finding]:
    """All that can be said about this node on its own, except packages and storage."""
    environment = os.environ
    findings, driver = machine.check_driver(gpus_expected=gpus_expected(environment))
    if driver:
        torch_findings, seen = packages.check_torch(environment)
        findings += torch_findings + machine.check_torch_gpus(seen, driver, environment.get("CUDA_VISIBLE_DEVICES"))
        findings += machine.check_links(len(driver))
    ports = network.infiniband_ports()
    active = any("ACTIVE" in port[0].upper() for port in ports.values())
    return [
        *findings,
        *network.check_interconnect(ports, with_gpus=bool(driver)),
        *network.check_variables(environment, active_infiniband=active),
        network.check_name(several_nodes=several_nodes),
        *network.check_ports(environment),
        *machine.check_limits(on_infiniband=active),
        machine.check_shared_memory(),
        machine.check_temporary(environment),
        machine.check_memory(),
        storage.check_caches(environment),
        storage.check_clock(),
    ]


def check_nodes(folder: Path, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Start a probe on every node of this job; needs srun, and `folder` on the shared file system."""
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    canary = folder / f".r1reward-canary-{uuid.uuid4().hex}"
    canary.write_text(canary.name)
    host = environment.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        with _Listener() as listener:
            command = ["srun", "--overlap", "--mem=0", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
            command += [sys.executable, "-m", "megatron_r1reward.doctor.nodes", str(folder), canary.name]
            command += [f"{host}:{listener.port}"]
            before = time.time()
            output = commands.run(command, timeout_s=_TIMEOUT_S, environment=clean_environment(environment))
            after = time.time()
    finally:
        canary.unlink(missing_ok=True)
    reports = read_reports(output.stdout)
    findings = merge_nodes(
        [Finding.from_json(row) for report in reports for row in report["findings"]], nodes=len(reports)
    )
    if len(reports) < nodes:
        answered = ", ".join(sorted(report["node"] for report in reports)) or "none"
        findings.append(
            error(
                "nodes.answer",
                f"{len(reports)} of {nodes} nodes answered ({answered}); srun: {output.problem or 'no message'}",
                "try srun --overlap --ntasks-per-node=1 hostname; a node that hangs is left out with --exclude",
            )
        )
    else:
        findings.append(ok("nodes.answer", f"{nodes} of {nodes} nodes answered"))
    return findings + compare_nodes(reports, before, after)


def compare_nodes(reports: list[dict[str, Any]], before: float, after: float) -> list[Finding]:
    """Nodes must run the same versions and agree on the time. Probes ran between `before` and `after` of our clock."""
    findings = []
    by_versions: dict[str, list[str]] = {}
    for report in reports:
        by_versions.setdefault(json.dumps(report["versions"], sort_keys=True), []).append(report["node"])
    if len(by_versions) > 1:
        groups = "; ".join(f"{','.join(sorted(names))}: {versions}" for versions, names in sorted(by_versions.items()))
        findings.append(
            error(
                "nodes.versions",
                f"the nodes have different environments: {groups}",
                "use one environment on the shared file system, or one container image",
            )
        )
    elif reports:
        findings.append(ok("nodes.versions", "all nodes run the same versions"))
    for report in reports:
        skew = max(before - report["time"], report["time"] - after, 0.0)
        if skew > _SKEW_S:
            message = f"the clock of {report['node']} is {skew:.0f} s off from this node's"
            findings.append(warning("nodes.clock", message, "have the site synchronise the clocks (chronyc tracking)"))
    return findings


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """`<mark> <node> <number> <of> <piece>` per line."""
    text = json.dumps(report)
    pieces = [text[start : start + _LINE_LENGTH] for start in range(0, len(text), _LINE_LENGTH)]
    return [f"{_MARK} {report['node']} {number} {len(pieces)} {piece}" for number, piece in enumerate(pieces)]


def read_reports(text: str) -> list[dict[str, Any]]:
    """The nodes' reports among whatever else a login shell or srun printed; an incomplete one is left out."""
    pieces: dict[str, dict[int, str]] = {}
    totals: dict[str, int] = {}
    for line in text.splitlines():
        if not line.startswith(_MARK + " "):
            continue
        _, node, number, total, piece = line.split(" ", 4)
        pieces.setdefault(node, {})[int(number)] = piece
        totals[node] = int(total)
    complete = (parts for node, parts in pieces.items() if len(parts) == totals[node])
    return [json.loads("".join(parts[number] for number in sorted(parts))) for parts in complete]


class _Listener:
    """Accepts and drops connections, to show that a node can be reached."""

    def __enter__(self) -> _Listener:
        self._server = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread up
        self._server.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            connection.close()


def check_reachable(address: str) -> Finding:
    """This node can open a connection to `host:port` on another."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as problem:
        return error(
            "nodes.connect",
            f"cannot connect to {address}: {problem}",
            "nodes of a job must reach each other on all high ports: have the site open the firewall between them, and "
            "the name lead to the right address",
        )
    return ok("nodes.connect", f"the first node can be reached ({address})")


def check_canary(folder: Path, name: str) -> Finding:
    """The file that the first node wrote is seen here."""
    started = time.monotonic()
    while True:
        try:
            os.listdir(folder)  # makes an NFS client look again
            if (folder / name).read_text() == name:
                break
        except OSError:
            pass
        if time.monotonic() - started > _CANARY_PATIENCE_S:
            return error(
                "storage.shared",
                f"a file that another node wrote to {folder} is not seen here within {_CANARY_PATIENCE_S:.0f} s",
                "put the run directory on a file system that all nodes mount under the same path; inside a container "
                "mount it there",
            )
        time.sleep(0.2)
    seconds = time.monotonic() - started
    if seconds > 5:
        fix = "mount NFS with a shorter actimeo (e.g. 3), or use another file system for run directories"
        return warning("storage.shared", f"a new file was seen here after {seconds:.0f} s", fix)
    return ok("storage.shared", f"{folder} is the same folder here")


def main(folder: str, canary: str, address: str) -> None:
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    now = time.time()
    several = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1
    findings = [check_canary(Path(folder), canary), check_reachable(address), *check_node(several_nodes=several)]
    versions = {name: found.version for name, found in packages.installed().items() if name in packages.COMPARED}
    rows = [replace(finding, node=node).to_json() for finding in findings]
    for line in report_lines({"node": node, "time": now, "versions": versions, "findings": rows}):
        print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
