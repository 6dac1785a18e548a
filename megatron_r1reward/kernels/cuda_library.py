"""The compiled CUDA kernel: where it lies, how it is called. A plain C interface through ctypes, no torch headers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from megatron_r1reward.kernels.policy_loss.options import FILTERS, PolicyLossOptions, TokenInputs
from megatron_r1reward.kernels.policy_loss.statistics import LOG2_E

SOURCE = Path(__file__).parent / "csrc" / "row_cluster.cu"
CLUSTER_BLOCKS = 4
# Two buffers of a quarter row fill at most 224 KiB of each block's shared memory.
MAX_ROW_BYTES = CLUSTER_BLOCKS * 112 * 1024


def path() -> Path:
    """The shared object that `build` writes, beside its source."""
    return SOURCE.with_suffix(".so")


class Arguments(ctypes.Structure):
    """Field for field `struct Arguments` of row_cluster.cu; `row_cluster_arguments_size` guards the layout."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "targets", "read", "old", "advantage", "weight")),
        *((name, ctypes.c_void_p) for name in ("sampler", "standardization")),
        *((name, ctypes.c_void_p) for name in ("log_prob", "entropy", "loss", "has_gradient", "flags")),
        ("row_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("filter", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("scale", "inverse_temperature", "filter_sigma")),
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
        raise ValueError(f"{file} does not exist: run python -m megatron_r1reward.kernels.build")
    handle = ctypes.CDLL(str(file))
    size = int(handle.row_cluster_arguments_size())
    if size != ctypes.sizeof(Arguments):
        raise ValueError(f"{file} takes {size} bytes of arguments, {ctypes.sizeof(Arguments)} expected: build it again")
    return handle


def row_(
    logits_RV: torch.Tensor, inputs: TokenInputs, read_R: torch.Tensor, options: PolicyLossOptions
) -> tuple[torch.Tensor, ...]:
    """As `triton_launch.row_`: overwrites bfloat16 logits on the GPU with their gradient.

    Returns (log_probs, entropy, loss, has_gradient int8, flags).

    Raises:
        ValueError: the rows do not start at multiples of 16 bytes, which bulk copies need.
    """
    rows, columns = logits_RV.shape
    if logits_RV.data_ptr() % 16 or logits_RV.stride(0) % 8:
        raise ValueError(
            f"logits start at {logits_RV.data_ptr():#x} with row stride {logits_RV.stride(0)}: the cluster kernel "
            "needs multiples of 16 bytes; choose 'triton'"
        )
    log_probs_R, entropy_R, loss_R = torch.zeros(3, rows, dtype=torch.float32, device=logits_RV.device).unbind()
    has_gradient_R = torch.zeros(rows, dtype=torch.int8, device=logits_RV.device)
    flags_R = torch.zeros(rows, dtype=torch.int32, device=logits_RV.device)
    low, high, clip_low, clip_high, dual = options.log_bounds

    def pointer(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    arguments = Arguments(
        logits=logits_RV.data_ptr(),
        targets=inputs.targets.data_ptr(),
        read=read_R.data_ptr(),
        old=inputs.old_log_probs.data_ptr(),
        advantage=inputs.advantages.data_ptr(),
        weight=inputs.weights.data_ptr(),
        sampler=pointer(inputs.sampler_log_probs) if options.importance_cap != float("inf") else None,
        standardization=pointer(inputs.standardization),
        log_prob=log_probs_R.data_ptr(),
        entropy=entropy_R.data_ptr(),
        loss=loss_R.data_ptr(),
        has_gradient=has_gradient_R.data_ptr(),
        flags=flags_R.data_ptr(),
        row_stride=logits_RV.stride(0),
        rows=rows,
        columns=columns,
        filter=FILTERS.index(options.filter),
        scale=LOG2_E / options.temperature,
        inverse_temperature=1.0 / options.temperature,
        filter_sigma=options.filter_sigma,
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
        raise RuntimeError(f"row_cluster failed with CUDA error {error} on {rows} x {columns} logits")
    return log_probs_R, entropy_R, loss_R, has_gradient_R, flags_R
