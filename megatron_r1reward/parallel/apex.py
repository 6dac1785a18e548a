"""Which `apex` is installed. NVIDIA's build serves megatron-core's fused optimizer where Transformer Engine is absent;
another project owns the name on the package registry, and `pip install apex` installs that one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Literal

Apex = Literal["absent", "nvidia", "unrelated"]


def identify_apex() -> Apex:
    """Look at the package's files without importing it: the unrelated one fails or has effects when imported."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        return "nvidia"
    return "unrelated"


def check_apex() -> Apex:
    """The installed kind; ValueError for the unrelated package, because megatron-core would import it by mistake."""
    kind = identify_apex()
    if kind == "unrelated":
        try:
            metadata = importlib.metadata.metadata("apex")
            named = f"{metadata['Name']} {metadata['Version']}: {metadata['Summary']}"
        except importlib.metadata.PackageNotFoundError:
            named = "no package metadata"
        raise ValueError(
            f"the installed package 'apex' ({named}) is not NVIDIA's Apex but an unrelated one of that name. "
            "Uninstall it (pip uninstall apex); Apex itself is optional and is built from NVIDIA's sources"
        )
    return kind
