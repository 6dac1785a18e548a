"""What this site's Slurm can do, as far as the scripts and recipes rely on it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from megatron_r1reward.cluster import commands
from megatron_r1reward.doctor.finding import Finding, error, note, ok, warning

_OLDEST = (20, 11)  # the first with srun --exact
_BAD_TRACKING = ("proctrack/linuxproc", "proctrack/pgid")


def controller_configuration() -> tuple[dict[str, str] | None, commands.Output]:
    """`scontrol show config` as a dictionary with lower-case keys, or None and the command's output."""
    output = commands.run(["scontrol", "show", "config"])
    if output.problem is not None:
        return None, output
    pairs = (line.split("=", 1) for line in output.stdout.splitlines() if "=" in line)
    return {key.strip().lower(): value.strip() for key, value in pairs}, output


def not_configured(output: commands.Output) -> bool:
    """`output` of an scontrol call: the commands are missing, or installed without any slurm.conf."""
    return output.missing or "configuration source" in (output.problem or "")


def check_slurm(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Empty where there is no Slurm and no job."""
    config, output = controller_configuration()
    if config is None:
        if not_configured(output) and "SLURM_JOB_ID" not in environment:
            return [note("slurm.commands", "no Slurm cluster is configured here: stages run with r1reward directly")]
        if output.missing:
            fix = "call the doctor outside the container, or mount the site's Slurm commands into it"
            return [note("slurm.commands", "inside a job, but Slurm's commands are not visible", fix)]
        fix = "scontrol ping shows whether slurmctld is up; is SLURM_CONF right on this machine?"
        return [error("slurm.controller", f"scontrol {output.problem}", fix)]
    findings = [
        ok("slurm.controller", f"cluster {config.get('clustername', '?')}"),
        _version(config),
        _accounting(config),
        _requeue(config),
        _steps(config),
        _tracking(config),
        _gres(config),
        _partitions(),
        _pyxis(),
    ]
    if "SLURM_JOB_ID" in environment:
        findings += _this_job(environment["SLURM_JOB_ID"])
    return findings


def _version(config: Mapping[str, str]) -> Finding:
    text = config.get("slurm_version", "0.0")
    found = tuple(int(part) for part in re.findall(r"\d+", text)[:2])
    if found >= _OLDEST:
        return ok("slurm.version", f"{text} has srun --exact")
    return error(
        "slurm.version",
        f"Slurm {text} is older than {_OLDEST[0]}.{_OLDEST[1]}: job steps cannot share a node on disjoint GPUs",
        "give every component nodes of its own, or have the site upgrade",
    )


def _accounting(config: Mapping[str, str]) -> Finding:
    fix = "the sbatch scripts do without; NeMo-Run's SlurmExecutor does not: have the site set up slurmdbd"
    if config.get("accountingstoragetype", "accounting_storage/none").endswith("/none"):
        return warning("slurm.accounting", "no accounting storage: sacct does not work", fix)
    output = commands.run(["sacct", "--noheader", "--allocations", "--starttime=now"])
    if output.problem is not None:
        return warning("slurm.accounting", f"sacct {output.problem}", fix)
    return ok("slurm.accounting", "sacct works")


def _requeue(config: Mapping[str, str]) -> Finding:
    if config.get("jobrequeue", "1") == "1":
        return ok("slurm.requeue", "jobs are requeued after a node failure, and may requeue themselves")
    return note("slurm.requeue", "JobRequeue=0: only jobs with --requeue come back; the scripts here ask for it")


def _steps(config: Mapping[str, str]) -> Finding:
    kind = config.get("selecttype", "")
    if kind.endswith("cons_tres"):
        return ok("slurm.steps", "job steps can be given GPUs of their own (select/cons_tres)")
    return warning(
        "slurm.steps",
        f"SelectType={kind}: job steps cannot be given single GPUs of a node",
        "put trainer, rollout servers and judge on nodes of their own, or have the site use select/cons_tres",
    )


def _tracking(config: Mapping[str, str]) -> Finding:
    kind = config.get("proctracktype", "")
    if kind not in _BAD_TRACKING:
        return ok("slurm.tracking", f"{kind} ends every process of a step")
    return warning(
        "slurm.tracking",
        f"ProctrackType={kind}: processes that leave their session survive scancel and keep GPUs and ports",
        "have the site use proctrack/cgroup",
    )


def _gres(config: Mapping[str, str]) -> Finding:
    types = config.get("grestypes", "(null)")
    if "gpu" in types.split(","):
        return ok("slurm.gres", "GPUs are a resource here (--gpus-per-node)")
    return note("slurm.gres", "this cluster counts no GPUs (GresTypes has no gpu): stages run on CPUs")


def _partitions() -> Finding:
    output = commands.run(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%G"])
    if output.problem is not None:
        fix = "is the partition hidden from you? scontrol show partition; ask the site for access"
        return warning("slurm.partitions", f"sinfo {output.problem}", fix)
    rows = [line.split("|") for line in output.stdout.splitlines() if line.count("|") == 4]
    up = [f"{name} ({nodes} nodes, {gres}, limit {limit})" for name, state, limit, nodes, gres in rows if state == "up"]
    if not up:
        return warning("slurm.partitions", "no partition is up for you", "sinfo shows the states; ask the site")
    return ok("slurm.partitions", "; ".join(up))


def _pyxis() -> Finding:
    output = commands.run(["srun", "--help"])
    if "--container-image" in output.stdout:
        return ok("slurm.containers", "srun takes --container-image (pyxis)")
    return note(
        "slurm.containers", "no pyxis: run on bare metal, or wrap the interpreter with the site's own container tool"
    )


def _this_job(job: str) -> list[Finding]:
    output = commands.run(["scontrol", "--oneliner", "show", "job", job])
    if output.problem is not None:
        return [note("slurm.job", f"scontrol show job {job}: {output.problem}")]
    fields = dict(part.split("=", 1) for part in output.stdout.split() if "=" in part)
    findings = [
        ok(
            "slurm.job",
            f"job {job} on {fields.get('NodeList', '?')}, limit {fields.get('TimeLimit', '?')}, "
            f"restart {fields.get('Restarts', '0')}",
        )
    ]
    if fields.get("Requeue") == "0":
        findings.append(
            warning(
                "slurm.job-requeue",
                f"job {job} was submitted without --requeue: it does not come back after a node failure",
                "submit with slurm/*.sh, which ask for it, or add #SBATCH --requeue",
            )
        )
    return findings
