"""Process limits, shared memory, memory and temporary space."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_r1reward.doctor.finding import Finding, error, ok, warning

_GIB = 2**30
_NOFILE_MIN, _NOFILE_GOOD = 1024, 8192  # every request in flight and every data worker holds descriptors
_NPROC_GOOD = 4096
_SHM_MIN, _SHM_GOOD = 1 * _GIB, 8 * _GIB  # vLLM passes images and NCCL its intra-node buffers through /dev/shm
_TMP_GOOD = 2 * _GIB

GetLimit = Callable[[int], tuple[int, int]]  # (soft, hard) as resource.getrlimit


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
        values = [_number(place / name) for place in places if place.is_relative_to(folder)]
        limits = [value for value in values if value is not None and value < 2**60]
        if limits:
            return min(limits)
    return None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _unlimited(value: int) -> bool:
    return value == resource.RLIM_INFINITY or value < 0


def _show(value: int) -> str:
    return "unlimited" if _unlimited(value) else str(value)
