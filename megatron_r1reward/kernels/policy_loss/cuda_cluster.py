"""A whole row per cluster of thread blocks: the compiled CUDA kernel, how it is built and how it is called.

A plain C interface through ctypes, no torch headers. The build needs nvcc 12.4 or later (CUDA toolkit, or the wheels of
the extra `kernels-build`) and a C++ compiler; no GPU:

    python -m megatron_r1reward.kernels.policy_loss.cuda_cluster [output.so]
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from megatron_r1reward.files import atomic_path
from megatron_r1reward.kernels.policy_loss.row_kernels import (
    LOG2_E,
    LogitRows,
    PolicyLossOptions,
    TokenInputs,
    WholeRowLoss,
)

HOW_TO_BUILD = "run python -m megatron_r1reward.kernels.policy_loss.cuda_cluster"
HOW_TO_GET_NVCC = "install a CUDA toolkit (set CUDA_HOME), or pip install 'megatron-r1reward[kernels-build]'"
SOURCE = Path(__file__).parent / "csrc" / "row_cluster.cu"
CLUSTER_BLOCKS = 4
# Two buffers of a quarter row fill at most 224 KiB of each block's shared memory.
MAX_ROW_BYTES = CLUSTER_BLOCKS * 112 * 1024


def path() -> Path:
    """The shared object that `build` writes, beside the source."""
    return SOURCE.with_suffix(".so")


class Arguments(ctypes.Structure):
    """Field for field `struct Arguments` of row_cluster.cu; `row_cluster_arguments_size` guards the layout."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "targets", "old", "advantage", "weight", "sampler")),
        *((name, ctypes.c_void_p) for name in ("log_prob", "entropy", "loss", "has_gradient", "flags")),
        ("row_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("scale", "inverse_temperature")),
        *((name, ctypes.c_float) for name in ("preclip_low", "preclip_high", "clip_low", "clip_high")),
        *((name, ctypes.c_float) for name in ("dual_clip", "importance_cap")),
    )


def load(library: Path | None = None) -> ctypes.CDLL:
    """Open the shared object and check its interface.

    Raises:
        ValueError: it is missing, or was built from another version of the source.
    """
    file = library or path()
    if not file.exists():
        raise ValueError(f"{file} does not exist: {HOW_TO_BUILD}")
    handle = ctypes.CDLL(str(file))
    size = int(handle.row_cluster_arguments_size())
    if size != ctypes.sizeof(Arguments):
        raise ValueError(f"{file} takes {size} bytes of arguments, {ctypes.sizeof(Arguments)} expected: build it again")
    return handle


def whole_rows_(rows: LogitRows, inputs: TokenInputs, options: PolicyLossOptions) -> WholeRowLoss:
    """See `WholeRowKernel`: bfloat16 logits on a GPU, no padding, no KL and entropy terms.

    Raises:
        ValueError: the rows do not start at multiples of 16 bytes, which bulk copies need.
    """
    logits_RV = rows.logits
    number, columns = logits_RV.shape
    if logits_RV.data_ptr() % 16 or logits_RV.stride(0) % 8:
        raise ValueError(
            f"logits start at {logits_RV.data_ptr():#x} with row stride {logits_RV.stride(0)}: the cluster kernel "
            "needs multiples of 16 bytes; choose 'triton'"
        )
    log_probs_R, entropy_R, loss_R = torch.zeros(3, number, dtype=torch.float32, device=logits_RV.device).unbind()
    has_gradient_R = torch.zeros(number, dtype=torch.int8, device=logits_RV.device)
    flags_R = torch.zeros(number, dtype=torch.int32, device=logits_RV.device)
    low, high, clip_low, clip_high, dual = options.log_bounds
    corrected = inputs.sampler_log_probs is not None and options.importance_cap != float("inf")
    arguments = Arguments(
        logits=logits_RV.data_ptr(),
        targets=rows.targets.data_ptr(),
        old=inputs.old_log_probs.data_ptr(),
        advantage=inputs.advantages.data_ptr(),
        weight=inputs.weights.data_ptr(),
        sampler=inputs.sampler_log_probs.data_ptr() if corrected else None,  # type: ignore[union-attr]
        log_prob=log_probs_R.data_ptr(),
        entropy=entropy_R.data_ptr(),
        loss=loss_R.data_ptr(),
        has_gradient=has_gradient_R.data_ptr(),
        flags=flags_R.data_ptr(),
        row_stride=logits_RV.stride(0),
        rows=number,
        columns=columns,
        scale=LOG2_E / rows.temperature,
        inverse_temperature=1.0 / rows.temperature,
        preclip_low=low,
        preclip_high=high,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual,
        importance_cap=options.importance_cap,
    )
    stream = torch.cuda.current_stream(logits_RV.device).cuda_stream
    error = load().row_cluster(ctypes.byref(arguments), ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"row_cluster failed with CUDA error {error} on {number} x {columns} logits")
    return WholeRowLoss(
        log_probs=log_probs_R, entropy=entropy_R, loss=loss_R, has_gradient=has_gradient_R.bool(), flags=flags_R
    )


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, of the PATH, or of NVIDIA's wheels; None: there is none."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    found = shutil.which("nvcc")
    candidates += [Path(found)] if found else []
    package = importlib.util.find_spec("nvidia")
    for root in (package.submodule_search_locations or []) if package else []:
        candidates += sorted(Path(root).glob("*/bin/nvcc"), reverse=True)
    return next((path for path in candidates if path.exists()), None)


def command(nvcc: Path, output: Path) -> list[str]:
    """The compiler call; ptxas reports registers and spills on stderr."""
    flags = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "--shared"]
    wheel_root = nvcc.parent.parent
    if (wheel_root / "include" / "cuda_runtime.h").exists() and (wheel_root / "lib").exists():
        flags += [f"-I{wheel_root / 'include'}", f"-L{wheel_root / 'lib'}"]
    return [str(nvcc), *flags, "-Xcompiler", "-fPIC", "-o", str(output), str(SOURCE)]


def build(output: Path | None = None) -> str:
    """Compile into `output` (default: `path()`); returns the compiler's report.

    Raises:
        ValueError: no compiler, or it failed; the message holds the reason.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise ValueError(f"nvcc is missing: {HOW_TO_GET_NVCC}")
    target = output or path()
    with atomic_path(target) as temporary:
        result = subprocess.run(command(nvcc, temporary), capture_output=True, text=True, check=False)
        if result.returncode:
            raise ValueError(f"{' '.join(command(nvcc, target))} failed:\n{result.stderr}")
    return result.stderr


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
