"""All checks that apply here, one group after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_r1reward.cluster import commands
from megatron_r1reward.doctor import imports, nodes, packages, running_servers, slurm_features, storage
from megatron_r1reward.doctor.finding import Finding
from megatron_r1reward.doctor.pins import Build

Place = Literal["machine", "login node", "job"]
Announce = Callable[[str], None]  # takes the name of the group that begins


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
            ("imports", lambda: [*imports.check_torch()[0], *imports.check_imports(build, has_gpus=has_gpus())])
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
        groups.append(("servers", lambda: running_servers.check_servers(run_dir)))
    findings: list[Finding] = []
    for name, check in groups:
        announce(name)
        findings += check()
    return Examination(place=place, build=build, findings=tuple(findings))
