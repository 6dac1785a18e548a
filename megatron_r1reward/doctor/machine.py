"""What this machine gives a process: GPUs as the driver and as torch see them, limits, shared memory, memory and
temporary space."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_r1reward.cluster import commands
from megatron_r1reward.doctor.finding import Finding, error, note, ok, warning

_FIELDS = (
    "index", "name", "driver_version", "memory.total", "memory.used", "compute_cap", "mig.mode.current",
    "ecc.errors.uncorrected.volatile.total",
)  # fmt: skip
_BUSY_FRACTION = 0.05
_BFLOAT16_CAPABILITY = 8.0
_GIB = 2**30
_NOFILE_MIN, _NOFILE_GOOD = 1024, 8192  # every request in flight and every data worker holds descriptors
_NPROC_GOOD = 4096
_SHM_MIN, _SHM_GOOD = 1 * _GIB, 8 * _GIB  # vLLM passes images and NCCL its intra-node buffers through /dev/shm
_TMP_GOOD = 2 * _GIB

GetLimit = Callable[[int], tuple[int, int]]  # (soft, hard) as resource.getrlimit


def query_driver() -> tuple[list[dict[str, str]] | None, commands.Output]:
    """One dictionary per GPU from nvidia-smi (memory in MiB), or None and the command's output."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    output = commands.run(query, timeout_s=60)
    if output.problem is not None:
        return None, output
    rows = csv.reader(output.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(_FIELDS, row, strict=True)) for row in rows if row], output


def check_driver(*, gpus_expected: bool) -> tuple[list[Finding], list[dict[str, str]]]:
    """Findings about the driver's GPUs, and the GPUs. `gpus_expected`: Slurm gave this job some."""
    gpus, output = query_driver()
    if gpus is None:
        if output.missing and not gpus_expected:
            return [note("gpu.driver", "no NVIDIA driver on this machine: stages run on the CPU")], []
        if gpus_expected:
            fix = (
                "outside a container: load the site's driver module; inside: start it with the NVIDIA hook (pyxis and "
                "enroot do, docker needs --gpus all)"
            )
            return [error("gpu.driver", f"the job has GPUs, but nvidia-smi {output.problem}", fix)], []
        fix = "reboot the node, or have the site match the kernel module and the driver libraries"
        return [error("gpu.driver", f"nvidia-smi fails: {output.problem}", fix)], []
    if not gpus:
        return [note("gpu.driver", "an NVIDIA driver, but no GPU that this process may use")], []
    findings = [ok("gpu.driver", f"{len(gpus)} x {gpus[0]['name']}, driver {gpus[0]['driver_version']}")]
    for gpu in gpus:
        findings += _check_gpu(gpu)
    return findings, gpus


def _check_gpu(gpu: Mapping[str, str]) -> list[Finding]:
    findings = []
    name = f"GPU {gpu['index']}"
    used, total = _number(gpu["memory.used"]), _number(gpu["memory.total"])
    if used is not None and total and used / total > _BUSY_FRACTION:
        findings.append(
            warning(
                "gpu.busy",
                f"{name}: {used / 1024:.1f} of {total / 1024:.1f} GiB are in use before the job begins",
                "nvidia-smi names the process: end what an earlier job left, or ask for the node with --exclusive",
            )
        )
    if gpu["mig.mode.current"] == "Enabled":
        findings.append(
            error(
                "gpu.mig",
                f"{name} is cut into MIG instances: NCCL does not work between them",
                "ask for whole GPUs (another partition or GRES type), or have the site turn MIG off",
            )
        )
    if (_number(gpu["ecc.errors.uncorrected.volatile.total"]) or 0) > 0:
        findings.append(
            error(
                "gpu.ecc",
                f"{name} has {gpu['ecc.errors.uncorrected.volatile.total']} uncorrected memory errors",
                f"leave the node out (#SBATCH --exclude={os.uname().nodename}) and tell the site",
            )
        )
    if (_number(gpu["compute_cap"]) or 99.0) < _BFLOAT16_CAPABILITY:
        findings.append(
            error(
                "gpu.capability",
                f"{name} ({gpu['name']}) has compute capability {gpu['compute_cap']}: no bfloat16",
                'use an Ampere GPU or newer, or set model.precision = "fp32" and rollout.dtype = "float32"',
            )
        )
    return findings


def check_torch_gpus(seen: Mapping[str, Any], driver: list[dict[str, str]], visible: str | None) -> list[Finding]:
    """torch sees the GPUs that it may use. `seen` is what `packages.check_torch` returned, `visible` the value of
    CUDA_VISIBLE_DEVICES."""
    if not driver or not seen or seen.get("cuda") is None:
        return []
    expected = len(driver) if visible is None else len([part for part in visible.split(",") if part.strip()])
    gpus = seen["gpus"]
    if len(gpus) < min(expected, len(driver)):
        return [
            error(
                "gpu.torch",
                f"torch sees {len(gpus)} of {min(expected, len(driver))} GPUs "
                f"(CUDA {seen['cuda']}, driver {driver[0]['driver_version']})",
                f"the driver must be new enough for CUDA {seen['cuda']} (or the cuda-compat package be on "
                "LD_LIBRARY_PATH); a wrong CUDA_VISIBLE_DEVICES has the same effect",
            )
        ]
    findings = [ok("gpu.torch", f"torch sees {len(gpus)} GPUs")]
    if len(gpus) > 1 and not seen["peers"]:
        findings.append(
            warning(
                "gpu.peers",
                "not every pair of GPUs can access each other's memory: tensor parallelism will be slow",
                "in a virtual machine or container let the GPUs see each other (ACS off, one IOMMU group), or keep "
                "parallel.tensor_model_parallel_size = 1",
            )
        )
    return findings


def check_links(gpus: int) -> list[Finding]:
    """NVLink between the GPUs of this machine."""
    if gpus < 2:
        return []
    output = commands.run(["nvidia-smi", "topo", "-m"], timeout_s=60)
    if output.problem is not None:
        return [note("gpu.links", f"nvidia-smi topo -m: {output.problem}")]
    rows = [line.split()[1 : 1 + gpus] for line in output.stdout.splitlines() if line.startswith("GPU")]
    pairs = [entry for row in rows for entry in row if entry != "X"]
    linked = [entry for entry in pairs if entry.startswith("NV")]
    if pairs and len(linked) == len(pairs):
        return [ok("gpu.links", f"all GPUs are joined by NVLink ({sorted(set(linked))[0]})")]
    return [
        warning(
            "gpu.links",
            f"{len(linked)} of {len(pairs)} directed pairs of GPUs have NVLink, the others go over PCIe",
            "keep tensor parallelism within GPUs that are joined (nvidia-smi topo -m), or use pipeline parallelism",
        )
    ]


def _number(text: str) -> float | None:
    """None for what nvidia-smi does not know ([N/A], [Not Supported])."""
    try:
        return float(text)
    except ValueError:
        return None


def check_limits(*, on_infiniband: bool, getrlimit: GetLimit = resource.getrlimit) -> list[Finding]:
    return [_nofile(getrlimit), _memlock(getrlimit, on_infiniband), _nproc(getrlimit)]


def _nofile(getrlimit: GetLimit) -> Finding:
    soft, hard = getrlimit(resource.RLIMIT_NOFILE)
    if _unlimited(soft) or soft >= _NOFILE_GOOD:
        return ok("limits.nofile", f"{_show(soft)} open files")
    way = f"ulimit -n {min(hard, 65536) if not _unlimited(hard) else 65536} in the job script or the site file"
    if not _unlimited(hard) and hard < _NOFILE_GOOD:
        way = f"the hard limit is {hard}: have the site raise nofile in limits.conf and in slurmd's unit (LimitNOFILE)"
    message = f"only {soft} open files allowed; hundreds of requests in flight need more"
    return (error if soft < _NOFILE_MIN else warning)("limits.nofile", message, way)


def _memlock(getrlimit: GetLimit, on_infiniband: bool) -> Finding:
    soft, _ = getrlimit(resource.RLIMIT_MEMLOCK)
    if _unlimited(soft):
        return ok("limits.memlock", "locked memory is unlimited")
    message = f"locked memory is limited to {soft / 2**20:.0f} MiB"
    if not on_infiniband:
        return ok("limits.memlock", f"{message}; no InfiniBand here that would need more")
    return error(
        "limits.memlock",
        f"{message}: NCCL cannot register its InfiniBand buffers",
        "LimitMEMLOCK=infinity in slurmd's unit, PropagateResourceLimitsExcept=MEMLOCK in slurm.conf; in a container "
        "--ulimit memlock=-1",
    )


def _nproc(getrlimit: GetLimit) -> Finding:
    soft, _ = getrlimit(resource.RLIMIT_NPROC)
    if _unlimited(soft) or soft >= _NPROC_GOOD:
        return ok("limits.nproc", f"{_show(soft)} processes and threads")
    return warning(
        "limits.nproc",
        f"only {soft} processes and threads allowed; each rank and server starts tens",
        f"ulimit -u {_NPROC_GOOD} or higher in the job script, or have the site raise nproc",
    )


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    if not folder.is_dir():
        return error("limits.shm", f"{folder} does not exist", "mount a tmpfs there; in a container: --shm-size=16g")
    usage = shutil.disk_usage(folder)
    message = f"{folder}: {usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    if usage.free >= _SHM_GOOD:
        return ok("limits.shm", message)
    fix = (
        f"start the container with --shm-size=16g or --ipc=host; on bare metal remove what earlier jobs left in "
        f"{folder}, or have the site enlarge it"
    )
    return (error if usage.free < _SHM_MIN else warning)("limits.shm", f"{message}; vLLM and NCCL need some GiB", fix)


def check_temporary(environment: Mapping[str, str] = os.environ) -> Finding:
    folder = Path(environment.get("TMPDIR") or tempfile.gettempdir())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return error(
            "limits.tmp",
            f"TMPDIR {folder} does not exist here or is not writable",
            "set TMPDIR to a folder that exists on every node, e.g. export TMPDIR=/tmp in the site file",
        )
    free = shutil.disk_usage(folder).free
    if free < _TMP_GOOD:
        return warning("limits.tmp", f"{folder} has {free / _GIB:.1f} GiB free", "clean it up or set TMPDIR elsewhere")
    return ok("limits.tmp", f"{folder} has {free / _GIB:.1f} GiB free")


def check_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> Finding:
    """Main memory that this process may use: the machine's, or less inside a job's control group."""
    total = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemTotal" in line)
    limit = _cgroup_limit(cgroup)
    if limit is None or limit >= total:
        return ok("limits.memory", f"{total / _GIB:.0f} GiB of memory")
    message = f"{limit / _GIB:.0f} of {total / _GIB:.0f} GiB of memory may be used"
    if limit >= 8 * _GIB:
        return ok("limits.memory", message)
    return warning("limits.memory", message, "ask for the node's memory: #SBATCH --mem=0")


def _cgroup_limit(root: Path) -> int | None:
    """Bytes of the strictest memory limit of this process's control groups (version 2, then 1)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        folder, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        if controllers not in ("", "memory"):
            continue
        places = [folder / path.strip("/"), *(folder / path.strip("/")).parents]
        values = [_number_in(place / name) for place in places if place.is_relative_to(folder)]
        limits = [value for value in values if value is not None and value < 2**60]
        if limits:
            return min(limits)
    return None


def _number_in(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _unlimited(value: int) -> bool:
    return value == resource.RLIM_INFINITY or value < 0


def _show(value: int) -> str:
    return "unlimited" if _unlimited(value) else str(value)
