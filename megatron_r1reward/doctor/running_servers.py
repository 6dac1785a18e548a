"""The rollout and judge servers of a run directory: what they answer, and what the run thinks of them."""

from __future__ import annotations

from pathlib import Path

from megatron_r1reward.cluster.server_health import unhealthy
from megatron_r1reward.doctor.finding import Finding, error, note, ok, warning
from megatron_r1reward.run_dir import Address, RunDir
from megatron_r1reward.servers.server_status import read_status


def check_servers(run_dir: Path) -> list[Finding]:
    """Every server that has published its address answers, and takes no longer than a run could wait."""
    run = RunDir(root=run_dir)
    if run.done.exists():
        return [ok("servers", f"{run_dir}: the stage is done, no server is needed")]
    found: list[Address] = []
    findings: list[Finding] = []
    for path in sorted(run.live.glob("*.address.json")):
        try:
            address = Address.read(path)
        except ValueError as unreadable:
            findings.append(warning("servers", str(unreadable), f"rm {path}"))
            continue
        if address is not None:
            found.append(address)
    for address in found:
        problem = unhealthy(address.url, attempts=1)
        if problem is None:
            findings.append(ok(f"servers.{address.component}", f"{address.url} on {address.host} is healthy"))
            continue
        findings.append(
            error(
                f"servers.{address.component}",
                f"{address.url} on {address.host}: {problem}",
                f"look at {_log(run, address.component)}; from a login node the port may be closed: ask inside the job",
            )
        )
    findings += _seen_by_the_run(run)
    return findings or [note("servers", f"{run_dir}: no server has published an address")]


def _seen_by_the_run(run: RunDir) -> list[Finding]:
    """State, load, failures, restarts and weights of each server, from the trainer's view of its pool."""
    findings = []
    for row in read_status(run.live) if any(run.live.glob("*-servers.json")) else ():
        weights = "its own weights" if row.weight_version is None else f"weight version {row.weight_version}"
        what = (
            f"{row.url} is {row.state}: {row.in_flight} requests in flight, {row.requests} answered, {row.failures} "
            f"failures, {row.restarts} restarts, {weights}"
        )
        if row.state == "ready":
            findings.append(ok(f"pool.{row.name}", what))
        else:
            fix = f"nothing while it is being restarted; otherwise look at {_log(run, row.name)}"
            reason = row.last_error.partition("\n")[0]
            findings.append(warning(f"pool.{row.name}", f"{what}; {reason}", fix))
    return findings


def _log(run: RunDir, component: str) -> Path:
    lives = run.lives()
    return run.log(lives[-1] if lives else 0, component)
