"""Do the heavy packages load? Each is imported in a process of its own: a crash there is a finding here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from megatron_r1reward.cluster import commands
from megatron_r1reward.doctor.finding import Finding, error, note, ok
from megatron_r1reward.doctor.pins import Build

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
