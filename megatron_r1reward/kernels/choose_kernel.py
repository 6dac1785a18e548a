"""Which implementation of the policy loss runs, and why. Nothing falls back silently.

`python -m megatron_r1reward.kernels.choose_kernel` prints the table for this machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from megatron_r1reward.kernels import cuda_library
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions

# "auto" takes the first that does not refuse. The two that form gradients in the forward wait at the end of the line:
# they read less memory, but no measurement on a GPU has confirmed them yet. Name them to use them.
TABLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu": ("torch", "triton"),
        "cuda": ("triton", "torch", "triton_row", "cuda_cluster"),
    }
)
DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "torch": "plain torch in cache-sized tiles, any device",
        "triton": "three Triton kernels: statistics, loss, gradient in place in the backward; any tensor parallelism",
        "triton_row": "one Triton launch per row: gradient over the logits in the forward; no tensor parallelism",
        "cuda_cluster": "CUDA C++, a cluster of blocks keeps the row on chip: one read, one write; sm_90, bfloat16",
    }
)
IN_FORWARD = ("triton_row", "cuda_cluster")  # these write the gradient in the forward


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an implementation is asked to handle."""

    device: str  # "cpu" or "cuda"
    dtype: torch.dtype
    columns: int  # of the rank's shard, padding included
    padded: bool  # some of them are padding
    tensor_parallel_size: int
    options: PolicyLossOptions
    rows_only: bool = False  # inside the LM head: row kernels, no gradient in the forward
    capability: tuple[int, int] | None = None  # compute capability, CUDA only


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The implementation taken, and the reason in words."""

    name: str
    reason: str


def choose(request: Request, *, requested: str = "auto", table: Mapping[str, Sequence[str]] = TABLE) -> Choice:
    """Pick an implementation.

    Args:
        requested: "auto", or a name to insist on.
        table: preference order per device type; replaces TABLE.

    Raises:
        ValueError: the requested implementation is unknown or cannot handle the request; the message says why.
    """
    if requested != "auto":
        refusal = refuses(requested, request)
        if refusal is not None:
            raise ValueError(f"implementation {requested!r} cannot be used: {refusal}. Choose another, or 'auto'")
        return Choice(name=requested, reason="requested by name")
    skipped: list[str] = []
    for name in table[request.device]:
        refusal = refuses(name, request)
        if refusal is None:
            before = "; ".join(skipped)
            reason = f"first for {request.device}" if not skipped else f"first that can for {request.device} ({before})"
            return Choice(name=name, reason=reason)
        skipped.append(f"{name}: {refusal}")
    raise ValueError(f"no implementation can handle {request}: {'; '.join(skipped)}")


def refuses(name: str, request: Request) -> str | None:
    """Why the implementation cannot handle the request; None when it can."""
    if name not in DESCRIPTIONS:
        return f"it is unknown; known are {', '.join(DESCRIPTIONS)}"
    if name == "torch":
        return None
    if name in IN_FORWARD:
        if request.rows_only:
            return "inside the LM head only row kernels run ('torch', 'triton')"
        if request.tensor_parallel_size > 1:
            return f"it needs whole rows, and the vocabulary is split over {request.tensor_parallel_size} ranks"
    return _refuses_cluster(request) if name == "cuda_cluster" else _refuses_triton(request)


def _refuses_triton(request: Request) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if request.device == "cpu":
        from megatron_r1reward.kernels.policy_loss import triton_launch

        if not triton_launch.INTERPRETED:
            return "Triton runs on a CPU only under its interpreter (TRITON_INTERPRET=1 before import)"
    return None


def _refuses_cluster(request: Request) -> str | None:
    options = request.options
    unsupported = {
        f"dtype {request.dtype}, it handles bfloat16": request.dtype != torch.bfloat16,
        "padded vocabulary": request.padded,
        f"{request.columns} columns, no multiple of 8": request.columns % 8 != 0,
        f"{request.columns} columns do not fit on a cluster": request.columns * 2 > cuda_library.MAX_ROW_BYTES,
        "a KL term in the loss": options.kl_coefficient != 0.0,
        "an entropy bonus": options.entropy_coefficient != 0.0,
        "filter 'released_code'": options.filter == "released_code",
    }
    found = [what for what, hit in unsupported.items() if hit]
    if found:
        return "it does not support " + ", ".join(found)
    if request.device != "cuda" or request.capability is None or request.capability[0] != 9:
        return "it needs a GPU of compute capability 9.x (Hopper)"
    if not cuda_library.path().exists():
        return "it is not built: run python -m megatron_r1reward.kernels.build"
    return None


def request_for(
    logits: torch.Tensor,
    *,
    padded: bool,
    tensor_parallel_size: int,
    options: PolicyLossOptions,
    rows_only: bool = False,
    columns: int | None = None,
) -> Request:
    """The request of a loss on these logits (or, with `columns`, on logits made from this tensor)."""
    cuda = logits.device.type == "cuda"
    return Request(
        device="cuda" if cuda else "cpu",
        dtype=logits.dtype,
        columns=logits.shape[-1] if columns is None else columns,
        padded=padded,
        tensor_parallel_size=tensor_parallel_size,
        options=options,
        rows_only=rows_only,
        capability=torch.cuda.get_device_capability(logits.device) if cuda else None,
    )


def _main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sample = torch.empty(0, 151_936, dtype=torch.bfloat16, device=device)
    request = request_for(sample, padded=False, tensor_parallel_size=1, options=PolicyLossOptions())
    for name in TABLE[device]:
        print(f"{name:13} {refuses(name, request) or 'available'}  --  {DESCRIPTIONS[name]}")
    choice = choose(request)
    print(f"auto on {device}: {choice.name}, {choice.reason}")


if __name__ == "__main__":
    _main()
