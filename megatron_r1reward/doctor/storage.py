"""The folder that all nodes share: writable, shared in fact, fast enough to see, with a clock that agrees."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from megatron_r1reward.cluster import commands
from megatron_r1reward.doctor.finding import Finding, error, note, ok, warning

_GIB = 2**30
_FREE_MIN, _FREE_GOOD = 1 * _GIB, 20 * _GIB
_INODES_GOOD = 10_000
_SKEW_S = 5.0
_SLOW_CANARY_S = 5.0
_LOCAL_TYPES = {"tmpfs", "overlay", "ramfs", "devtmpfs", "squashfs"}
_NETWORK_TYPES = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.ceph",
    "wekafs",
    "cifs",
    "9p",
    "panfs",
    "pvfs2",
}
_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT")


def file_system(folder: Path, mounts: str | None = None) -> tuple[str, str]:
    """(type, mount point) of the file system that holds `folder`; `mounts` in the format of /proc/mounts."""
    text = mounts if mounts is not None else Path("/proc/mounts").read_text()
    best = ("unknown", "/")
    for line in text.splitlines():
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        if folder.resolve().is_relative_to(point) and len(point) >= len(best[1]):
            best = (kind, point)
    return best


def check_folder(folder: Path, *, on_cluster: bool, mounts: str | None = None) -> list[Finding]:
    """A canary file can be written, renamed, read back, locked and removed; there is space; the clock agrees.

    `folder` must exist. `on_cluster`: other nodes will use it too.
    """
    fix = f"choose a folder on the shared file system that you may write to (run.output_dir, --run-dir): {folder}"
    canary = folder / f".r1reward-canary-{uuid.uuid4().hex}"
    staging = canary.with_suffix(".partial")
    before = time.time()
    try:
        with staging.open("w") as file:
            file.write(canary.name)
            file.flush()
            os.fsync(file.fileno())
            locks = _locks(file.fileno())
        staging.rename(canary)
        intact = canary.read_text() == canary.name
        modified = canary.stat().st_mtime
    except OSError as problem:
        return [error("storage.canary", f"{folder} cannot be used: {problem}", fix)]
    finally:
        for path in (staging, canary):
            path.unlink(missing_ok=True)
    after = time.time()
    if not intact:
        return [error("storage.canary", f"{folder}: a file read back differs from what was written", fix)]
    return [
        _canary(folder, after - before),
        check_skew(modified, before, after),
        _lock_finding(folder, locks),
        _kind(folder, on_cluster, mounts),
        *_space(folder),
    ]


def _canary(folder: Path, seconds: float) -> Finding:
    message = f"{folder}: a small file was written, renamed and read in {seconds * 1000:.0f} ms"
    if seconds < _SLOW_CANARY_S:
        return ok("storage.canary", f"{folder} is writable")
    return warning("storage.canary", message, "the file system is overloaded: logs and checkpoints will stall the run")


def check_skew(modified: float, before: float, after: float) -> Finding:
    """`modified`: the time that the file server gave to a file which was written between `before` and `after`."""
    skew = max(before - modified, modified - after, 0.0)
    if skew <= _SKEW_S:
        return ok("clock.file-server", "this node's clock and the file server's agree")
    return warning(
        "clock.file-server",
        f"this node's clock and the file server's differ by {skew:.0f} s: heartbeats look stale, saves come late",
        "have the site synchronise the clocks (chronyc tracking, timedatectl)",
    )


def check_clock() -> Finding:
    """Time synchronisation as systemd or chrony report it."""
    output = commands.run(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    answer = output.stdout.strip()
    if output.code != 0 or answer not in ("yes", "no"):
        chrony = commands.run(["chronyc", "tracking"])
        if chrony.code != 0:
            return note("clock.synchronised", "timedatectl and chronyc do not tell here whether the clock is right")
        answer = "no" if "Not synchronised" in chrony.stdout else "yes"
    if answer == "yes":
        return ok("clock.synchronised", "the clock is synchronised")
    return warning(
        "clock.synchronised",
        "the clock is not synchronised: walltime saves and heartbeats depend on it",
        "have the site start chronyd or systemd-timesyncd on the nodes",
    )


def _locks(descriptor: int) -> str | None:
    """None where file locks work, else the problem."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as problem:
        return str(problem)
    return None


def _lock_finding(folder: Path, problem: str | None) -> Finding:
    if problem is None:
        return ok("storage.locks", "file locks work")
    return warning(
        "storage.locks",
        f"{folder}: flock fails ({problem}); dataset and compile caches there break when ranks share them",
        "mount Lustre with -o flock, or point HF_HOME and TRITON_CACHE_DIR at a node-local folder",
    )


def _kind(folder: Path, on_cluster: bool, mounts: str | None) -> Finding:
    kind, point = file_system(folder, mounts)
    if on_cluster and kind in _LOCAL_TYPES:
        return warning(
            "storage.shared",
            f"{folder} lies on {kind} at {point}, which other nodes do not see",
            "put run directories, models and data on the shared file system",
        )
    if kind in _NETWORK_TYPES:
        return ok("storage.shared", f"{folder} lies on {kind} at {point}")
    level_note = "; inside a job every node looks for a canary file there" if on_cluster else ""
    return note("storage.shared", f"{folder} lies on {kind} at {point}{level_note}")


def _space(folder: Path) -> list[Finding]:
    free = shutil.disk_usage(folder).free
    inodes = os.statvfs(folder)
    findings = []
    message = f"{free / _GIB:.0f} GiB free in {folder}"
    fix = "remove old checkpoints (checkpoint.keep_last), or write elsewhere; a 7B checkpoint with optimizer is 100 GB"
    if free < _FREE_MIN:
        findings.append(error("storage.space", message, fix))
    elif free < _FREE_GOOD:
        findings.append(warning("storage.space", message, fix))
    else:
        findings.append(ok("storage.space", message))
    if inodes.f_files > 0 and inodes.f_favail < _INODES_GOOD:
        inode_fix = "remove many small files (embedded images, old logs), or ask for a larger inode quota"
        findings.append(warning("storage.inodes", f"only {inodes.f_favail} inodes free in {folder}", inode_fix))
    return findings


def check_caches(environment: Mapping[str, str] = os.environ, mounts: str | None = None) -> Finding:
    """Compile caches on a network file system are slow, and many ranks write the same files at once."""
    home = Path(environment.get("HOME", "/"))
    places = {name: Path(environment.get(name) or home / ".cache") for name in _CACHES}
    slow = [name for name, place in places.items() if file_system(place, mounts)[0] in _NETWORK_TYPES]
    if not slow:
        return ok("storage.caches", "compile caches are on local storage")
    return warning(
        "storage.caches",
        f"{', '.join(slow)} would use a network file system ({home}/.cache by default)",
        "in the site file: " + " ".join(f"export {name}=/tmp/$USER/{name.split('_')[0].lower()};" for name in slow),
    )
