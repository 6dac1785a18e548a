"""What the fused LM-head operations share: chunked logits, float32 weight gradients, Megatron's `main_grad`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_r1reward.kernels import choose_kernel
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions, VocabularyShard
from megatron_r1reward.kernels.policy_loss.row_kernels import RowKernels, row_kernels

CPU_CHUNK_BYTES = 24 << 20  # logits of one chunk: rows enough for the matrix product, little memory
CPU_COLUMNS = 8192  # columns whose float32 copies exist at one time on a CPU
MAX_CHUNK_ROWS = 1024
GPU_CHUNK_ROWS = 4096  # the float32 weight gradient needs > 1067 rows to be bound by arithmetic on an H100


@dataclass(frozen=True, kw_only=True)
class Head:
    """The vocabulary-parallel LM head of one call."""

    group: dist.ProcessGroup | None  # None: one rank
    shard: VocabularyShard
    chunk_rows: int
    logits_dtype: torch.dtype
    kernels: RowKernels
    choice: choose_kernel.Choice
    reduce_hidden_gradient: bool

    def chunks(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.chunk_rows, rows)) for start in range(0, rows, self.chunk_rows))

    def reduce(self, grad_hidden: torch.Tensor) -> torch.Tensor:
        """Sum the ranks' shares of the hidden gradient, unless the caller does it."""
        if self.group is not None and self.reduce_hidden_gradient:
            dist.all_reduce(grad_hidden, group=self.group)
        return grad_hidden


def make_head(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
    chunk_rows: int | None,
    logits_dtype: torch.dtype | None,
    implementation: str,
    reduce_hidden_gradient: bool,
    options: PolicyLossOptions,
) -> Head:
    """ValueError for shapes that do not fit or an implementation that cannot run here."""
    if hidden_RH.dim() != 2 or hidden_RH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden states {tuple(hidden_RH.shape)} do not fit an LM head {tuple(weight_VH.shape)}: "
            "pass [rows, H] and [V / tp, H]"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}: it must be at least 1")
    group = group if group is not None and group.size() > 1 else None
    ranks, rank = (group.size(), dist.get_rank(group)) if group is not None else (1, 0)
    columns = weight_VH.shape[0]
    shard = VocabularyShard.of_rank(columns, rank, vocab_size)
    request = choose_kernel.request_for(
        hidden_RH,
        padded=shard.width < columns,
        tensor_parallel_size=ranks,
        options=options,
        rows_only=True,
        columns=columns,
    )
    choice = choose_kernel.choose(request, requested=implementation)
    return Head(
        group=group,
        shard=shard,
        chunk_rows=chunk_rows or default_chunk_rows(columns, hidden_RH.device),
        logits_dtype=logits_dtype or hidden_RH.dtype,
        kernels=row_kernels(choice.name),
        choice=choice,
        reduce_hidden_gradient=reduce_hidden_gradient,
    )


def default_chunk_rows(columns: int, device: torch.device) -> int:
    """Rows whose logits exist at one time."""
    if device.type != "cpu":
        return GPU_CHUNK_ROWS
    return max(16, min(MAX_CHUNK_ROWS, CPU_CHUNK_BYTES // (4 * max(1, columns))))


def chunk_logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, buffer_KV: torch.Tensor) -> torch.Tensor:
    """hidden @ weight^T into the first rows of the buffer, whose dtype may be wider than the operands'."""
    logits_CV = buffer_KV[: hidden_CH.shape[0]]
    if logits_CV.dtype == hidden_CH.dtype:
        return torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)
    if hidden_CH.device.type == "cuda":
        return torch.mm(hidden_CH, weight_VH.t(), out_dtype=logits_CV.dtype, out=logits_CV)
    wide_CH = hidden_CH.to(logits_CV.dtype)  # a CPU has no product with a wider result
    for start in range(0, weight_VH.shape[0], CPU_COLUMNS):
        columns = slice(start, start + CPU_COLUMNS)
        logits_CV[:, columns] = wide_CH @ weight_VH[columns].to(logits_CV.dtype).t()
    return logits_CV


def add_weight_gradient_(grad_weight_VH: torch.Tensor, grad_logits_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """grad_weight += grad_logits^T @ hidden, accumulated in float32 whatever the operands' dtype."""
    if grad_logits_CV.dtype == torch.float32:
        grad_weight_VH.addmm_(grad_logits_CV.t(), hidden_CH)
    elif grad_logits_CV.device.type == "cuda":
        torch.addmm(
            grad_weight_VH, grad_logits_CV.t(), hidden_CH, out_dtype=torch.float32, out=grad_weight_VH
        )  # one GEMM with a float32 result; no float32 copy of its operands
    else:
        wide_CH = hidden_CH.float()
        for start in range(0, grad_weight_VH.shape[0], CPU_COLUMNS):
            columns = slice(start, start + CPU_COLUMNS)
            grad_weight_VH[columns].addmm_(grad_logits_CV[:, columns].t().float(), wide_CH)


def takes_main_grad(weight: torch.Tensor) -> bool:
    """Whether Megatron's DDP has given this parameter a float32 gradient buffer."""
    main_grad = getattr(weight, "main_grad", None)
    return main_grad is not None and main_grad.dtype == torch.float32 and hasattr(weight, "grad_added_to_main_grad")


def weight_gradient_buffer(weight: torch.Tensor) -> torch.Tensor:
    """Where to add the weight gradient: `main_grad` itself, or a new float32 tensor."""
    if takes_main_grad(weight):
        return weight.main_grad  # type: ignore[attr-defined]
    return torch.zeros_like(weight, dtype=torch.float32)


def autograd_weight_gradient(weight: torch.Tensor, grad_weight_VH: torch.Tensor) -> torch.Tensor:
    """What the backward returns for the weight.

    After an addition to `main_grad` autograd still needs a tensor, or DDP's hook does not fire. megatron-core's own
    linear layer does the same (tensor_parallel/layers.py): the hook ignores it, unless the weight is tied to the
    embedding (`zero_out_wgrad`): then it is added together with the embedding's gradient, and must be zero.
    """
    if not takes_main_grad(weight):
        return grad_weight_VH.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    tied = bool(getattr(weight, "zero_out_wgrad", False))
    return torch.zeros_like(weight) if tied else torch.empty_like(weight)
