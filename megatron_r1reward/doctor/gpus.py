"""GPUs as the driver and as torch see them."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import Any

from megatron_r1reward.cluster import commands
from megatron_r1reward.doctor.finding import Finding, error, note, ok, warning

_FIELDS = (
    "index", "name", "driver_version", "memory.total", "memory.used", "compute_cap", "mig.mode.current",
    "ecc.errors.uncorrected.volatile.total",
)  # fmt: skip
_BUSY_FRACTION = 0.05
_BFLOAT16_CAPABILITY = 8.0


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
    """torch sees the GPUs that it may use. `seen` is what `imports.check_torch` returned, `visible` the value of
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
