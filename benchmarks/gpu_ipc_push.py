"""Weights from one process to another through shared memory: CUDA IPC on a GPU, a memory file on a CPU.

    python benchmarks/gpu_ipc_push.py [--buckets 64] [--json FILE] [--check]

The sender fills a staging bucket, the receiver copies it into its own memory and answers with its checksum: what
`weight_transport = "ipc"` does per bucket, without vLLM.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch
from reporting import print_table, write_json

from megatron_r1reward.weight_sync.shared_memory import (
    MemoryFile,
    SharedBuffer,
    export_cuda,
    open_cuda,
    open_memory_file,
)

BUCKET_BYTES = 64 << 20


def receive(connection: Any, shared: SharedBuffer, device: str) -> None:
    """The receiver's process: a copy and a checksum per message."""
    if shared.path is not None:
        source = open_memory_file(shared.path, shared.num_bytes, "the sender is on this machine")
    else:
        source = open_cuda(shared, torch.device(device))
    own = torch.empty_like(source)
    while connection.recv():
        own.copy_(source)
        connection.send(int(own.view(torch.int64).sum()))


def push(buckets: int, bucket_bytes: int, device: str) -> dict[str, Any]:
    """Seconds, and whether every bucket arrived as it was sent."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    memory = MemoryFile(bucket_bytes) if device == "cpu" else None
    staging = memory.tensor if memory else torch.empty(bucket_bytes, dtype=torch.uint8, device=device)
    shared = SharedBuffer(num_bytes=bucket_bytes, path=memory.path) if memory else export_cuda(staging)
    here, there = context.Pipe()
    process = context.Process(target=receive, args=(there, shared, device), daemon=True)
    process.start()
    weights = torch.randint(0, 255, (bucket_bytes,), dtype=torch.uint8, device=device)
    right, seconds = True, 0.0
    for number in range(buckets + 1):
        started = time.perf_counter()
        staging.copy_(weights)
        if device != "cpu":
            torch.cuda.synchronize()
        here.send(True)
        arrived = here.recv()
        seconds += time.perf_counter() - started if number else 0.0  # the first one opens the buffer
        right &= arrived == int(weights.view(torch.int64).sum())
        weights = weights.roll(1)
    here.send(False)
    process.join(30)
    total = buckets * bucket_bytes
    kind = "memory file" if memory else "CUDA IPC"
    if memory:
        memory.close()
    return {"transport": kind, "MB": total / 1e6, "seconds": seconds, "GB/s": total / seconds / 1e9, "right": right}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buckets", type=int, default=64)
    parser.add_argument("--dry-run", action="store_true", help="a memory file on a CPU, small; its time means nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 when a bucket arrived changed")
    arguments = parser.parse_args()
    small = arguments.dry_run
    row = push(2 if small else arguments.buckets, 1 << 20 if small else BUCKET_BYTES, "cpu" if small else "cuda:0")
    print_table(list(row), [row])
    write_json(arguments.json, "gpu_ipc_push", [row])
    print(f"{row['transport']}: every bucket arrived as it was sent: {row['right']}")
    return int(arguments.check and not row["right"])


if __name__ == "__main__":
    sys.exit(main())
