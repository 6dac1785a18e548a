"""The policy loss on a GPU: ceilings, our variants and peers from materialised logits, and the fused LM head.

Inputs are restored and the L2 cache is flushed outside the timed region: in-place kernels destroy their input. With
tensor parallelism only the shape of a shard is real on one GPU; the collective is not timed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import policy_loss_peers as peers
import torch
from reporting import print_table, write_json

from megatron_r1reward.algorithm.policy_loss import policy_loss
from megatron_r1reward.config.schema import AlgorithmSection
from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.kernels.linear_policy_loss import linear_policy_loss
from megatron_r1reward.kernels.lm_head import Head, HeadOptions
from megatron_r1reward.kernels.policy_loss.row_kernels import (
    LogitRows,
    PolicyLossOptions,
    TokenInputs,
    VocabularyShard,
)

SEQUENCE = 1024  # rows per sequence; the last one carries no loss, because Liger's loss shifts by one
CHECKED_ROWS = 64  # rows whose gradient is compared with float64
GOAL_SHAPE = (8192, 152_064)
FLOOR_SHARE, LIGER_FACTOR, HEAD_SHARE = 0.90, 2.0, 0.85  # goals on an H100
OPTIONS = PolicyLossOptions()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The device, the ceilings measured on it, and the time that is left."""

    device: str
    bandwidth: float  # bytes per second of a copy, reads and writes counted
    flops: float  # bfloat16 matmul
    deadline: float
    repeats: int
    flush: torch.Tensor | None

    def median_ms(self, function: Callable[[], object], restore: Callable[[], object] = lambda: None) -> float:
        times = []
        for number in range(self.repeats + 2):
            restore()
            if self.flush is not None:
                self.flush.zero_()
            if self.device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                torch.cuda.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                started = time.perf_counter()
                function()
                elapsed = 1e3 * (time.perf_counter() - started)
            if number >= 2:  # the first two compile and warm up
                times.append(elapsed)
        return statistics.median(times)

    def extra_mib(self, function: Callable[[], object]) -> float | None:
        if self.device != "cuda":
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(device: str, budget_s: float) -> Bench:
    """Copy bandwidth and matmul rate of this device."""
    deadline = time.monotonic() + budget_s
    if device != "cuda":
        return Bench(device=device, bandwidth=1.0, flops=1.0, deadline=deadline, repeats=1, flush=None)
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    bench = Bench(device=device, bandwidth=1.0, flops=1.0, deadline=deadline, repeats=20, flush=flush)
    source = torch.empty(2 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / bench.median_ms(lambda: target.copy_(source)) * 1e3
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    flops = 2 * 8192**3 / bench.median_ms(lambda: a @ b) * 1e3
    return Bench(device=device, bandwidth=bandwidth, flops=flops, deadline=deadline, repeats=bench.repeats, flush=flush)


def make_inputs(rows: int, vocabulary: int, active: float, device: str) -> tuple[torch.Tensor, TokenInputs]:
    """bfloat16 logits [R, V] and inputs; one advantage per sequence, which all peers can take."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=device)
    for part in logits.split(1024):
        part.copy_(torch.randn(part.shape, generator=generator, device=device) * 3)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator, device=device)
    picked = [
        part.float().log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        for part, ids in zip(logits.split(1024), targets.split(1024), strict=True)
    ]
    length = min(SEQUENCE, rows)
    carries = torch.rand(rows, generator=generator, device=device) < active
    carries.view(-1, length)[:, -1] = False
    advantages = torch.randn(rows // length, generator=generator, device=device).repeat_interleave(length)
    noise = 0.1 * torch.randn(rows, generator=generator, device=device)
    return logits, TokenInputs(
        targets=targets,
        old_log_probs=torch.cat(picked) + noise,
        advantages=advantages,
        weights=carries.float() / carries.sum(),
    )


def torch_loss(logits: torch.Tensor, inputs: TokenInputs) -> torch.Tensor:
    """The truth on materialised logits, in their dtype's float32 or wider."""
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    log_probs = log_p.gather(1, inputs.targets[:, None]).squeeze(1)
    result = policy_loss(log_probs, inputs.old_log_probs, inputs.advantages, AlgorithmSection())
    return (result.per_token_loss * inputs.weights).sum()


def ours(implementation: str) -> peers.Provider:
    """Loss and gradient over the logits by one of our implementations."""

    def make(inputs: TokenInputs, length: int) -> Callable[[torch.Tensor], torch.Tensor]:
        del length
        options = HeadOptions(implementation=implementation)

        def step(logits: torch.Tensor) -> torch.Tensor:
            shard = VocabularyShard(start=0, width=logits.shape[1])
            head = Head.of_logits(shard.width, logits.dtype, logits.device, options=options, loss=OPTIONS)
            rows = LogitRows(logits=logits, targets=inputs.targets, shard=shard)
            if head.whole_row is not None:
                head.whole_row(rows, inputs, OPTIONS)
            else:
                merged, loss = head.kernels.loss(head.kernels.statistics(rows)[None], inputs, OPTIONS)
                head.kernels.gradient_(rows, merged, loss.grad_log_prob, None)
            return logits

        return step

    return make


def providers(device: str) -> dict[str, peers.Provider]:
    own = ("torch", "triton", "triton_row") + (("cuda_cluster",) if device == "cuda" else ())
    others = peers.providers(torch_loss)
    if device == "cpu":
        del others["torch.compile"]  # compiles for a minute and shows nothing
    return {f"ours: {name}": ours(name) for name in own} | others


def rows_table(bench: Bench, shapes: list[tuple[int, int, float]]) -> list[dict[str, Any]]:
    """Loss from logits: every provider at every (rows, columns, active share)."""
    table = []
    for rows, columns, active in shapes:
        source, inputs = make_inputs(rows, columns, active, bench.device)
        scratch = source.clone()
        reference = _reference_gradient(source, inputs)
        carrying = int((inputs.weights != 0).sum())
        floor_ms = 1e3 * (6 * carrying + 2 * (rows - carrying)) * columns / bench.bandwidth
        for name, make in providers(bench.device).items():
            if time.monotonic() > bench.deadline:
                print("time is up: the rest of the table is left out")
                return table
            entry: dict[str, Any] = {"provider": name, "rows": rows, "columns": columns, "active": active}
            entry |= {"ms": None, "% of floor": None, "extra MiB": None, "gradient error": None, "note": ""}
            try:
                step = make(inputs, min(SEQUENCE, rows))
                restore = partial(scratch.copy_, source)
                run_once = partial(step, scratch)
                restore()
                got = run_once()[:CHECKED_ROWS].double()
                entry["gradient error"] = float((got - reference).norm() / reference.norm())
                restore()
                entry["extra MiB"] = bench.extra_mib(run_once)
                entry["ms"] = bench.median_ms(run_once, restore)
                entry["% of floor"] = 100 * floor_ms / entry["ms"] if bench.device == "cuda" else None
            except (ImportError, ValueError, RuntimeError, AssertionError) as error:
                entry["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
            table.append(entry)
            print(f"# {entry}", flush=True)
    return table


def _reference_gradient(logits: torch.Tensor, inputs: TokenInputs) -> torch.Tensor:
    """float64 gradient of the first rows."""
    leaf = logits[:CHECKED_ROWS].double().requires_grad_()
    kept = inputs.take(slice(0, CHECKED_ROWS))
    return torch.autograd.grad(torch_loss(leaf, kept), leaf)[0]


def head_table(bench: Bench, rows: int, columns: int, hidden: int) -> list[dict[str, Any]]:
    """LM head and loss, forward and backward, over a range of active shares."""
    table = []
    generator = torch.Generator(bench.device).manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator, device=bench.device).bfloat16().requires_grad_()
    weight = torch.randn(columns, hidden, generator=generator, device=bench.device).mul_(hidden**-0.5)
    weight = weight.bfloat16().requires_grad_()

    def fused(inputs: TokenInputs) -> torch.Tensor:
        return linear_policy_loss(states, weight, inputs, OPTIONS).total

    def recompute(inputs: TokenInputs) -> torch.Tensor:
        picked = (inputs.weights != 0).nonzero().squeeze(1)
        kept = inputs.take(picked)
        log_probs, _ = linear_log_probs(states[picked], weight, kept.targets)
        result = policy_loss(log_probs, kept.old_log_probs, kept.advantages, AlgorithmSection())
        return (result.per_token_loss * kept.weights).sum()

    def dense(inputs: TokenInputs) -> torch.Tensor:
        return torch_loss(states @ weight.t(), inputs)

    for active in (1.0, 0.5, 0.25, 0.1):
        inputs = TokenInputs(
            targets=torch.randint(0, columns, (rows,), generator=generator, device=bench.device),
            old_log_probs=torch.full((rows,), -12.0, device=bench.device),
            advantages=torch.randn(rows, generator=generator, device=bench.device),
            weights=(torch.arange(rows, device=bench.device) < active * rows).float() / rows,
        )
        for name, loss in (("fused head", fused), ("recompute", recompute), ("torch, all rows", dense)):
            if time.monotonic() > bench.deadline:
                return table

            def step(loss: Callable[[TokenInputs], torch.Tensor] = loss, inputs: TokenInputs = inputs) -> object:
                return torch.autograd.grad(loss(inputs), (states, weight))

            entry: dict[str, Any] = {"provider": name, "rows": rows, "columns": columns, "hidden": hidden}
            entry |= {"active": active, "ms": None, "% of floor": None, "extra MiB": None, "note": ""}
            try:
                entry["extra MiB"] = bench.extra_mib(step)
                entry["ms"] = bench.median_ms(step)
                floor_ms = 1e3 * 6 * active * rows * hidden * columns / bench.flops
                entry["% of floor"] = 100 * floor_ms / entry["ms"] if bench.device == "cuda" else None
            except RuntimeError as error:
                entry["note"] = str(error).splitlines()[0][:90]
            table.append(entry)
            print(f"# {entry}", flush=True)
    return table


def goals(rows: list[dict[str, Any]], heads: list[dict[str, Any]]) -> bool:
    """Print the figures that count; whether they meet the goals."""
    at_goal = {r["provider"]: r for r in rows if (r["rows"], r["columns"], r["active"]) == (*GOAL_SHAPE, 1.0)}
    own = [r for name, r in at_goal.items() if name.startswith("ours: ") and r["ms"]]
    full = [r for r in heads if r["provider"] == "fused head" and r["active"] == 1.0 and r["ms"]]
    if not own or not full:
        print("the shapes of the goals were not measured")
        return False
    best = min(own, key=lambda r: r["ms"])
    liger = at_goal.get("liger GRPO", {}).get("ms")
    factor = liger / best["ms"] if liger else float("nan")
    print(
        f"{best['provider']}: {best['ms']:.2f} ms, {best['% of floor']:.0f} % of the floor "
        f"(goal {100 * FLOOR_SHARE:g}), {factor:.2f} times Liger (goal {LIGER_FACTOR:g}); "
        f"fused head {full[0]['% of floor']:.0f} % of 6NHV (goal {100 * HEAD_SHARE:g})"
    )
    return (
        best["% of floor"] >= 100 * FLOOR_SHARE and factor >= LIGER_FACTOR and full[0]["% of floor"] >= 100 * HEAD_SHARE
    )


def run(json_file: Path | None, *, budget_s: float, dry_run: bool) -> bool:
    """The whole GPU part; `dry_run` goes through the code on a CPU with tiny shapes and means no time."""
    device = "cpu" if dry_run else "cuda"
    bench = ceilings(device, budget_s)
    if dry_run:
        rows, heads = rows_table(bench, [(8, 512, 1.0)]), head_table(bench, 64, 512, 16)
    else:
        shapes = [(*GOAL_SHAPE, 1.0), (8192, 19_008, 1.0), (4096, 152_064, 1.0)]
        rows, heads = rows_table(bench, shapes), head_table(bench, 8192, 152_064, 3584)
        print(f"copy {bench.bandwidth / 1e12:.2f} TB/s, matmul {bench.flops / 1e12:.0f} TFLOP/s")
    for table in (rows, heads):
        if table:
            print_table(list(table[0]), table)
    if dry_run:
        write_json(json_file, "policy_loss", rows, head=heads, dry_run=True)
    else:
        facts = {"head": heads, "copy_bytes_per_s": bench.bandwidth, "matmul_flops": bench.flops}
        write_json(json_file, "policy_loss", rows, **facts)
    return all(not row["note"] for row in rows if row["provider"].startswith("ours")) if dry_run else goals(rows, heads)
