"""The rollout and judge servers of a run directory."""

from __future__ import annotations

from pathlib import Path

from megatron_r1reward.launch.doctor.finding import Finding, error, note, ok, warning
from megatron_r1reward.launch.health import unhealthy
from megatron_r1reward.monitor.run_state import Address, RunDir


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
    return findings or [note("servers", f"{run_dir}: no server has published an address")]


def _log(run: RunDir, component: str) -> Path:
    lives = run.lives()
    return run.log(lives[-1] if lives else 0, component)
