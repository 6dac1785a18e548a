"""Which implementation of the row kernels runs, and why. Nothing falls back silently.

`python -m megatron_r1reward.kernels.choose_kernel` prints the table for this machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from megatron_r1reward.kernels.policy_loss import cuda_cluster, torch_rows
from megatron_r1reward.kernels.policy_loss.row_kernels import PolicyLossOptions, RowKernels, WholeRowKernel

# "auto" takes the first that does not refuse. The two that handle whole rows are taken by name only: they read less
# memory, but no measurement on a GPU has confirmed them yet.
TABLE: Mapping[str, tuple[str, ...]] = MappingProxyType({"cpu": ("torch", "triton"), "cuda": ("triton", "torch")})
DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "torch": "plain torch in cache-sized tiles, any device",
        "triton": "three Triton kernels: statistics, loss, gradient in place; any tensor parallelism",
        "triton_row": "one Triton launch per chunk, a whole row per program; no tensor parallelism",
        "cuda_cluster": "CUDA C++, a cluster of blocks keeps the row on chip: one read, one write; sm_90, bfloat16",
    }
)
WHOLE_ROW = ("triton_row", "cuda_cluster")


@dataclass(frozen=True, kw_only=True)
class KernelRequest:
    """What an implementation is asked to handle."""

    device: str  # "cpu" or "cuda"
    dtype: torch.dtype  # of the logits
    columns: int  # of the rank's shard, padding included
    padded: bool  # some of them are padding
    tensor_parallel_size: int
    options: PolicyLossOptions | None  # None: log-probs and entropies only
    capability: tuple[int, int] | None = None  # compute capability, CUDA only


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The implementation taken, and the reason in words."""

    name: str
    reason: str


def choose(request: KernelRequest, *, requested: str = "auto") -> Choice:
    """Pick an implementation. `requested`: "auto", or a name to insist on.

    Whole-row kernels form the loss of an update. Where only log-probs are asked for, the best row kernels stand in.

    Raises:
        ValueError: the requested implementation is unknown or cannot handle the request; the message says why.
    """
    if requested in WHOLE_ROW and request.options is None:
        choice = choose(request)
        return Choice(name=choice.name, reason=f"{requested!r} forms the loss of an update only; {choice.reason}")
    if requested != "auto":
        refusal = refuses(requested, request)
        if refusal is not None:
            raise ValueError(f"precision.kernels {requested!r} cannot be used: {refusal}. Choose another, or 'auto'")
        return Choice(name=requested, reason="requested by name")
    skipped: list[str] = []
    for name in TABLE[request.device]:
        refusal = refuses(name, request)
        if refusal is None:
            before = "; ".join(skipped)
            reason = f"first for {request.device}" if not skipped else f"first that can for {request.device} ({before})"
            return Choice(name=name, reason=reason)
        skipped.append(f"{name}: {refusal}")
    raise ValueError(f"no implementation can handle {request}: {'; '.join(skipped)}")


def refuses(name: str, request: KernelRequest) -> str | None:
    """Why the implementation cannot handle the request; None when it can."""
    if name not in DESCRIPTIONS:
        return f"it is unknown; known are {', '.join(DESCRIPTIONS)}"
    if name == "torch":
        return None
    if name in WHOLE_ROW and request.tensor_parallel_size > 1:
        return f"it needs whole rows, and the vocabulary is split over {request.tensor_parallel_size} ranks"
    return _refuses_cluster(request) if name == "cuda_cluster" else _refuses_triton(request)


def _refuses_triton(request: KernelRequest) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if request.device == "cpu":
        from megatron_r1reward.kernels.policy_loss import triton_rows

        if not triton_rows.INTERPRETED:
            return "Triton runs on a CPU only under its interpreter (TRITON_INTERPRET=1 before import)"
    return None


def _refuses_cluster(request: KernelRequest) -> str | None:
    options = request.options or PolicyLossOptions()
    unsupported = {
        f"{request.dtype} logits (it handles bfloat16: precision.logits = 'model' with model.precision 'bf16')": (
            request.dtype != torch.bfloat16
        ),
        "padded vocabulary": request.padded,
        f"{request.columns} columns, no multiple of 8": request.columns % 8 != 0,
        f"{request.columns} columns, which do not fit on a cluster": request.columns * 2 > cuda_cluster.MAX_ROW_BYTES,
        "a KL term in the loss": options.kl_coefficient != 0.0,
        "an entropy bonus": options.entropy_coefficient != 0.0,
    }
    found = [what for what, hit in unsupported.items() if hit]
    if found:
        return "it does not support " + ", ".join(found)
    if request.device != "cuda" or request.capability is None or request.capability[0] != 9:
        return "it needs a GPU of compute capability 9.x (Hopper)"
    if not cuda_cluster.path().exists():
        return f"it is not built: {cuda_cluster.HOW_TO_BUILD}"
    return None


def request_for(
    device: torch.device,
    *,
    dtype: torch.dtype,
    columns: int,
    padded: bool = False,
    tensor_parallel_size: int = 1,
    options: PolicyLossOptions | None = None,
) -> KernelRequest:
    """The request of a loss, or of log-probs where there are no `options`, on logits of this device."""
    cuda = device.type == "cuda"
    return KernelRequest(
        device="cuda" if cuda else "cpu",
        dtype=dtype,
        columns=columns,
        padded=padded,
        tensor_parallel_size=tensor_parallel_size,
        options=options,
        capability=torch.cuda.get_device_capability(device) if cuda else None,
    )


def row_kernels(name: str) -> RowKernels:
    """The row kernels behind a name that `choose` returned; of a whole-row kernel those that run without a gradient.
    Triton is imported on first use."""
    if name == "torch":
        kernels: RowKernels = torch_rows
        return kernels
    from megatron_r1reward.kernels.policy_loss import triton_rows

    return triton_rows


def whole_row_kernel(name: str) -> WholeRowKernel | None:
    """The whole-row kernel behind a name; None where the row kernels do it in three steps."""
    if name == "triton_row":
        from megatron_r1reward.kernels.policy_loss import triton_rows

        return triton_rows.whole_rows_
    return cuda_cluster.whole_rows_ if name == "cuda_cluster" else None


def _main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        request = request_for(device, dtype=dtype, columns=151_936, options=PolicyLossOptions())
        print(f"{dtype} logits on {device.type}:")
        for name in DESCRIPTIONS:
            print(f"  {name:13} {refuses(name, request) or 'available'}  --  {DESCRIPTIONS[name]}")
        choice = choose(request)
        print(f"  auto: {choice.name}, {choice.reason}")


if __name__ == "__main__":
    _main()
