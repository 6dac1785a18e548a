"""All checks that apply here, one group after the other, and what they found as a table or as JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1reward.cluster import commands
from megatron_r1reward.cluster.placement import Stage
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.doctor import nodes, packages, slurm_features, storage
from megatron_r1reward.doctor.finding import LEVELS, Finding, error, note, ok, warning, worst
from megatron_r1reward.doctor.packages import Build
from megatron_r1reward.doctor.run_file import check_run_file, stage_of
from megatron_r1reward.network.server_api import unhealthy
from megatron_r1reward.run_dir import Address, RunDir
from megatron_r1reward.servers.member import read_status

Place = Literal["machine", "login node", "job"]
Announce = Callable[[str], None]  # takes the name of the group that begins
_STYLE = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found, and where."""

    place: Place
    build: Build
    findings: tuple[Finding, ...]


def where(environment: Mapping[str, str] = os.environ) -> Place:
    if "SLURM_JOB_ID" in environment:
        return "job"
    return "machine" if slurm_features.not_configured(slurm_features.controller_configuration()[1]) else "login node"


def has_gpus() -> bool:
    """The kernel module of an NVIDIA driver is loaded."""
    return Path("/proc/driver/nvidia/version").exists()


def examine(
    folder: Path,
    *,
    run_dir: Path | None = None,
    inputs: Callable[[], list[Finding]] | None = None,
    announce: Announce = lambda group: None,
    quick: bool = False,
) -> Examination:
    """Run the checks.

    Args:
        folder: on the file system that runs will use; exists.
        run_dir: also ask the servers of this run.
        inputs: also look at what a stage reads (`run_file.check_run_file`).
        announce: told before each group of checks.
        quick: leave out the imports of the heavy packages, which take half a minute.
    """
    place = where()
    build = packages.build_of(packages.installed(), has_gpus=has_gpus())
    groups: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("packages", lambda: packages.check_packages(build, has_gpus=has_gpus()))
    ]
    if not quick:
        groups.append(
            ("imports", lambda: [*packages.check_torch()[0], *packages.check_imports(build, has_gpus=has_gpus())])
        )
    groups.append(("storage", lambda: storage.check_folder(folder, on_cluster=place != "machine")))
    groups.append(("slurm", slurm_features.check_slurm))
    if place == "job" and not commands.run(["srun", "--version"]).missing:
        groups.append(("nodes of the job", lambda: nodes.check_nodes(folder)))
    else:
        groups.append(("this machine", nodes.check_node))
    if inputs is not None:
        groups.append(("the run file's inputs", inputs))
    if run_dir is not None:
        groups.append(("servers", lambda: check_servers(run_dir)))
    findings: list[Finding] = []
    for name, check in groups:
        announce(name)
        findings += check()
    return Examination(place=place, build=build, findings=tuple(findings))


def to_json(result: Examination) -> str:
    """`{"place", "build", "worst", "findings": [{"check", "level", "message", "fix", "node"}]}`."""
    tree: dict[str, Any] = {
        "place": result.place,
        "build": result.build,
        "worst": worst(result.findings),
        "findings": [finding.to_json() for finding in result.findings],
    }
    return json.dumps(tree, indent=2)


def show(result: Examination, console: Console) -> None:
    """What is well is one line per check; warnings and errors come last, each with its fix."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in sorted(result.findings, key=lambda finding: LEVELS.index(finding.level)):
        style = _STYLE[finding.level]
        node = f"[{finding.node}] " if finding.node else ""
        table.add_row(f"[{style}]{finding.level}[/]", finding.check, escape(node + finding.message))
        if finding.fix and finding.level != "ok":
            table.add_row("", "", f"[{style}]fix:[/] {escape(finding.fix)}")
    console.print(table)
    counts = Counter(finding.level for finding in result.findings)
    summary = ", ".join(f"{counts[level]} {level}" for level in LEVELS if counts[level])
    console.print(f"[bold]{result.place}, {result.build} environment: {summary}[/]", highlight=False)


def run_doctor(
    folder: Path,
    *,
    run_dir: Path | None,
    as_json: bool,
    quick: bool,
    config: RunConfig | None = None,
    stage: Stage | None = None,
) -> int:
    """Examine and print; returns the exit code: 1 when there is an error, else 0.

    Raises:
        ValueError: `folder` or `run_dir` is not a folder, or the run file `config` does not say which stage it is for.
    """
    inputs = partial(check_run_file, config, stage or stage_of(config)) if config is not None else None
    for path in (folder, *([run_dir] if run_dir is not None else [])):
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder: create it, or name another")
    progress = Console(stderr=True)
    with progress.status("examining") as status:
        result = examine(
            folder.resolve(),
            run_dir=run_dir,
            inputs=inputs,
            announce=lambda group: status.update(f"examining {group}"),
            quick=quick,
        )
    if as_json:
        print(to_json(result))
    else:
        show(result, Console())
    return 1 if worst(result.findings) == "error" else 0


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
