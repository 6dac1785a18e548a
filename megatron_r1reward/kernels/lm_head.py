"""The vocabulary-parallel LM head, chunk by chunk: logits, float32 weight gradients, Megatron's `main_grad`, and the
rows that it needs out of sequence-parallel hidden states.

No [tokens, vocabulary] tensor exists: `linear_log_probs` and `linear_policy_loss` hold one chunk of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1reward.kernels.choose_kernel import choose, request_for, row_kernels, whole_row_kernel
from megatron_r1reward.kernels.policy_loss.row_kernels import (
    LogitRows,
    PolicyLossOptions,
    RowKernels,
    VocabularyShard,
    WholeRowKernel,
)

CPU_CHUNK_BYTES = 24 << 20  # logits of one chunk: rows enough for the matrix product, little memory
CPU_COLUMNS = 8192  # columns whose float32 copies exist at one time on a CPU
MAX_CHUNK_ROWS = 1024
# Of float32 logits, and twice as many of bfloat16 logits, so that a chunk has the same size. The float32 weight
# gradient needs > 1067 rows to be bound by arithmetic on an H100.
GPU_CHUNK_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """How the LM head turns hidden states into distributions; the defaults are those of a run.

    `temperature` divides the logits. `excluded_ids` are left out of the softmax: what a server never samples.
    """

    temperature: float = 1.0
    excluded_ids: tuple[int, ...] = ()
    logits_dtype: torch.dtype | None = torch.float32  # None: that of the hidden states, which rounds before the softmax
    implementation: str = "auto"  # of the row kernels, see `choose_kernel`
    chunk_rows: int | None = None  # rows whose logits exist at one time; None: by device and vocabulary
    vocab_size: int | None = None  # rows of the whole LM head that are no padding; None: all
    # False leaves the sum over the tensor-parallel ranks to the caller (`gather_sequence_parallel_rows` does it).
    reduce_hidden_gradient: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it divides the logits, choose a value above 0")
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows is {self.chunk_rows}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Head:
    """The LM head of one call."""

    options: HeadOptions
    group: dist.ProcessGroup | None  # tensor-parallel; None: one rank
    shard: VocabularyShard
    chunk_rows: int
    logits_dtype: torch.dtype
    kernels: RowKernels
    whole_row: WholeRowKernel | None  # forms loss and gradient instead, where there is a gradient
    excluded_columns: torch.Tensor | None  # int64, of this rank

    @classmethod
    def of_call(
        cls,
        hidden_RH: torch.Tensor,
        weight_VH: torch.Tensor,
        group: dist.ProcessGroup | None,
        options: HeadOptions,
        loss: PolicyLossOptions | None,
    ) -> Head:
        """For these operands. ValueError for shapes that do not fit or an implementation that cannot run here."""
        if hidden_RH.dim() != 2 or hidden_RH.shape[1] != weight_VH.shape[1]:
            raise ValueError(
                f"hidden states {tuple(hidden_RH.shape)} do not fit an LM head {tuple(weight_VH.shape)}: "
                "pass [rows, H] and [V / tp, H]"
            )
        dtype = options.logits_dtype or hidden_RH.dtype
        return cls.of_logits(len(weight_VH), dtype, hidden_RH.device, group=group, options=options, loss=loss)

    @classmethod
    def of_logits(
        cls,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        group: dist.ProcessGroup | None = None,
        options: HeadOptions,
        loss: PolicyLossOptions | None,
    ) -> Head:
        """For logits of this width, type and place; `loss` None: log-probs and entropies only.

        Raises:
            ValueError: the implementation cannot run here.
        """
        group = group if group is not None and group.size() > 1 else None
        ranks, rank = (group.size(), dist.get_rank(group)) if group is not None else (1, 0)
        shard = VocabularyShard.of_rank(columns, rank, options.vocab_size)
        request = request_for(
            device,
            dtype=dtype,
            columns=columns,
            padded=shard.width < columns,
            tensor_parallel_size=ranks,
            options=loss,
        )
        name = choose(request, requested=options.implementation).name
        excluded = [i - shard.start for i in options.excluded_ids if shard.start <= i < shard.start + columns]
        return cls(
            options=options,
            group=group,
            shard=shard,
            chunk_rows=options.chunk_rows or default_chunk_rows(columns, device, dtype),
            logits_dtype=dtype,
            kernels=row_kernels(name),
            whole_row=whole_row_kernel(name),
            excluded_columns=torch.tensor(excluded, device=device) if excluded else None,
        )

    def chunks(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.chunk_rows, rows)) for start in range(0, rows, self.chunk_rows))

    def buffer(self, hidden_RH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        """Room for one chunk of logits."""
        return hidden_RH.new_empty(min(len(hidden_RH), self.chunk_rows), len(weight_VH), dtype=self.logits_dtype)

    def logits(
        self, hidden_CH: torch.Tensor, weight_VH: torch.Tensor, targets_C: torch.Tensor, buffer_KV: torch.Tensor
    ) -> LogitRows:
        """hidden @ weight^T in the first rows of the buffer, whose dtype may be wider than the operands'."""
        logits_CV = buffer_KV[: hidden_CH.shape[0]]
        if logits_CV.dtype == hidden_CH.dtype:
            torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)
        elif hidden_CH.device.type == "cpu":
            wide_CH = hidden_CH.to(logits_CV.dtype)  # a CPU has no product with a wider result
            for start in range(0, weight_VH.shape[0], CPU_COLUMNS):
                columns = slice(start, start + CPU_COLUMNS)
                logits_CV[:, columns] = wide_CH @ weight_VH[columns].to(logits_CV.dtype).t()
        else:  # the product is accumulated in float32 anyway: it is not rounded on its way out
            torch.mm(hidden_CH, weight_VH.t(), out_dtype=logits_CV.dtype, out=logits_CV)
        if self.excluded_columns is not None:
            logits_CV.index_fill_(1, self.excluded_columns, -torch.inf)
        return LogitRows(logits=logits_CV, targets=targets_C, shard=self.shard, temperature=self.options.temperature)

    def gather(self, parts_4C: torch.Tensor) -> torch.Tensor:
        """The statistics of all ranks, [ranks, 4, C]: ONE all-gather of 16 bytes per row and rank."""
        if self.group is None:
            return parts_4C[None]
        parts_T4C = parts_4C.new_empty(self.group.size(), *parts_4C.shape)
        dist.all_gather_into_tensor(parts_T4C.view(-1), parts_4C.reshape(-1), group=self.group)
        return parts_T4C

    def reduce(self, grad_hidden: torch.Tensor) -> torch.Tensor:
        """Sum the ranks' shares of the hidden gradient, unless the caller does it."""
        if self.group is not None and self.options.reduce_hidden_gradient:
            dist.all_reduce(grad_hidden, group=self.group)
        return grad_hidden


def default_chunk_rows(columns: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows whose logits exist at one time."""
    if device.type != "cpu":
        return GPU_CHUNK_ROWS * 4 // dtype.itemsize
    return max(16, min(MAX_CHUNK_ROWS, CPU_CHUNK_BYTES // (4 * max(1, columns))))


def add_weight_gradient_(grad_weight_VH: torch.Tensor, grad_logits_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """grad_weight += grad_logits^T @ hidden, accumulated in float32 whatever the operands' dtype."""
    if grad_logits_CV.dtype == torch.float32:
        grad_weight_VH.addmm_(grad_logits_CV.t(), hidden_CH)
    elif grad_logits_CV.device.type == "cpu":
        wide_CH = hidden_CH.float()
        for start in range(0, grad_weight_VH.shape[0], CPU_COLUMNS):
            columns = slice(start, start + CPU_COLUMNS)
            grad_weight_VH[columns].addmm_(grad_logits_CV[:, columns].t().float(), wide_CH)
    else:  # one GEMM with a float32 result, no float32 copy of its operands; as of torch 2.10
        torch.addmm(grad_weight_VH, grad_logits_CV.t(), hidden_CH, out_dtype=torch.float32, out=grad_weight_VH)


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


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_SH: torch.Tensor, positions_R: torch.Tensor, group: dist.ProcessGroup, partial: bool
    ) -> torch.Tensor:
        ranks, rank, length = group.size(), dist.get_rank(group), hidden_SH.shape[0]
        owner_R = positions_R.div(length, rounding_mode="floor")
        counts = torch.bincount(owner_R, minlength=ranks)
        order_R = owner_R.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        place_R = torch.empty_like(order_R)  # of each row among those of its owner
        place_R[order_R] = torch.arange(len(order_R), device=order_R.device) - starts[owner_R[order_R]]
        widest = int(counts.max()) if len(positions_R) else 0
        mine_R = owner_R == rank
        local_M = positions_R[mine_R] - rank * length
        sent_KH = hidden_SH.new_zeros(widest, hidden_SH.shape[1])
        sent_KH[place_R[mine_R]] = hidden_SH[local_M]
        received_TKH = hidden_SH.new_empty(ranks, widest, hidden_SH.shape[1])
        dist.all_gather_into_tensor(received_TKH.view(-1, hidden_SH.shape[1]), sent_KH, group=group)
        ctx.save_for_backward(owner_R, place_R, mine_R, local_M)
        ctx.group, ctx.shape, ctx.widest, ctx.partial = group, hidden_SH.shape, widest, partial
        return received_TKH[owner_R, place_R]

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        owner_R, place_R, mine_R, local_M = ctx.saved_tensors
        ranks, width = ctx.group.size(), ctx.shape[1]
        grad_SH = grad_RH.new_zeros(ctx.shape)
        if not ctx.partial:
            grad_SH.index_add_(0, local_M, grad_RH[mine_R])
            return grad_SH, None, None, None
        shares_TKH = grad_RH.new_zeros(ranks, ctx.widest, width)
        shares_TKH[owner_R, place_R] = grad_RH
        own_KH = grad_RH.new_empty(ctx.widest, width)
        dist.reduce_scatter_tensor(own_KH, shares_TKH.view(-1, width), group=ctx.group)
        grad_SH.index_add_(0, local_M, own_KH[place_R[mine_R]])
        return grad_SH, None, None, None


def gather_sequence_parallel_rows(
    hidden_SH: torch.Tensor, positions_R: torch.Tensor, group: dist.ProcessGroup, *, partial_gradients: bool = True
) -> torch.Tensor:
    """Rows `positions_R` of the whole sequence on every rank, [R, H], from this rank's slice.

    The backward sums the ranks' gradients and returns each rank its own rows with one reduce-scatter: pass
    `reduce_hidden_gradient=False` to the head that consumes the rows.

    Args:
        hidden_SH: rank r of the tensor-parallel group holds positions [r S, (r + 1) S), S = T / tp.
        positions_R: int64 positions in the whole sequence, the same on every rank.
        group: tensor-parallel group.
        partial_gradients: False where every rank computes the same of the rows: each then takes its own rows of the
            gradient, which is whole, and nothing is summed.

    Raises:
        ValueError: a position lies outside the sequence.
    """
    length = hidden_SH.shape[0] * group.size()
    if len(positions_R) and not (int(positions_R.min()) >= 0 and int(positions_R.max()) < length):
        raise ValueError(f"positions_R reach {int(positions_R.max())}, but the sequence has {length} positions")
    return _GatherRows.apply(hidden_SH, positions_R, group, partial_gradients)
