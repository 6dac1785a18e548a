"""What `precision.logits` decides: error of log-probs, memory and time of float32 and of rounded logits.

    python benchmarks/logits_precision.py [--vocabulary 32768] [--hidden 1024] [--rows 1024] [--json FILE] [--check]

bfloat16 hidden states and LM head; the error is against float64 of the same values, at tokens sampled from their
softmax. Memory is the allocator's peak of a forward and backward pass over what was there before. Goal: the float32
path's worst error below 1e-4 nats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from reporting import print_table, write_json

from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.kernels.lm_head import HeadOptions

GOAL = 1e-4  # nats
CHECKED = 256  # rows compared with float64


@contextmanager
def peak_mib(found: list[float]) -> Iterator[None]:
    """Allocated above the start, at its highest."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        torch.cuda.synchronize()
        found.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profiler:
        yield
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    found.append(peak / 2**20)


def compare(device: torch.device, vocabulary: int, hidden: int, rows: int) -> list[dict[str, Any]]:
    """A row for "model" (rounded to bfloat16) and one for "fp32"."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator).bfloat16()
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 6.4 * hidden**-0.5).bfloat16()
    exact_CV = states[:CHECKED].double() @ weight.double().t()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[:CHECKED] = torch.multinomial(exact_CV.softmax(-1), 1, generator=generator)[:, 0]
    exact_C = exact_CV.log_softmax(-1).gather(1, targets[:CHECKED, None])[:, 0]
    targets_there = targets.to(device)
    table = []
    for name, dtype in (("model", None), ("fp32", torch.float32)):
        leaves = [x.to(device).requires_grad_() for x in (states, weight)]
        options = HeadOptions(logits_dtype=dtype)

        def step(leaves: list[torch.Tensor] = leaves, options: HeadOptions = options) -> torch.Tensor:
            log_probs, _ = linear_log_probs(*leaves, targets_there, options=options)
            torch.autograd.grad(log_probs.sum(), leaves)
            return log_probs.detach()

        error_C = (step()[:CHECKED].cpu().double() - exact_C).abs()
        peaks: list[float] = []
        with peak_mib(peaks):
            step()
        entry: dict[str, Any] = {"precision.logits": name, "vocabulary": vocabulary, "rows": rows, "hidden": hidden}
        entry |= {"mean error": float(error_C.mean()), "max error": float(error_C.max()), "peak MiB": peaks[0]}
        table.append(entry | {"ms": milliseconds(step, device)})
    return table


def milliseconds(step: Any, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(5):
        wait()
        started = time.perf_counter()
        step()
        wait()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 when the goal is missed")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = compare(device, arguments.vocabulary, arguments.hidden, arguments.rows)
    print_table(list(rows[0]), rows)
    write_json(arguments.json, "logits_precision", rows, goal=GOAL)
    rounded, kept = rows
    print(
        f"worst log-prob error: {kept['max error']:.1e} nats with float32 logits (goal {GOAL:g}), "
        f"{rounded['max error']:.1e} with rounded ones"
    )
    return int(arguments.check and kept["max error"] >= GOAL)


if __name__ == "__main__":
    sys.exit(main())
