"""Bytes per second of a weight push into running vLLM servers, by transport, size, servers and tensor parallelism.

Beside every push: what a plain gloo broadcast of the same bytes in the same buckets to as many processes reaches, and
what copying the bytes in memory reaches, in the same run. A push is everything between the trainer's call and its
return: pause, clear caches, pack, send, checksums on both ends, load into the layers, finish, verify, resume. Goal: a
gloo push of the largest size reaches at least half of the plain broadcast, into every layout of servers.

    python benchmarks/weight_push.py [--sizes 128x2 768x8 1536x8] [--json FILE] [--check]

`ipc` is a memory file on a CPU and CUDA IPC on a GPU; `nccl` is measured where there is a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from reporting import print_table, write_json
from safetensors.torch import load_file
from servers import SECTION, write_model
from transformers import PreTrainedTokenizerFast

from megatron_r1reward.rollout.open_pool import build_transport
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.servers.build import SERVED_NAME
from megatron_r1reward.servers.process import VllmServer, start_servers
from megatron_r1reward.types import TensorMeta
from megatron_r1reward.weight_sync.broadcast_group import BroadcastGroup, Rendezvous, listen

GOAL = 0.5  # of a plain gloo broadcast
COLUMNS = ("transport", "MB", "servers", "tp", "push_s", "GB_per_s", "of_memory_copy", "of_plain_gloo")


def best_of(repeats: int, work: Any) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def memory_copy_s(num_bytes: int, repeats: int) -> float:
    """Seconds to copy as many bytes between two buffers that are in use already."""
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    return best_of(repeats, lambda: target.copy_(source))


def plain_gloo_s(num_bytes: int, receivers: int, bucket_bytes: int, repeats: int) -> float:
    """Seconds of a bare broadcast to `receivers` processes that do nothing else with the bytes."""
    sizes = [min(bucket_bytes, num_bytes - start) for start in range(0, num_bytes, bucket_bytes)]
    store = listen("127.0.0.1", 300)
    meeting = Rendezvous(
        backend="gloo", host="127.0.0.1", port=store.port, rank_offset=0, world_size=receivers + 1, timeout_s=300
    )
    given = {"meeting": asdict(meeting), "sizes": sizes, "rounds": repeats + 1}
    program = str(Path(__file__).with_name("gloo_receiver.py"))
    children = [
        subprocess.Popen([sys.executable, program, json.dumps(given | {"rank": rank})])
        for rank in range(1, receivers + 1)
    ]
    group = BroadcastGroup(store, meeting, 0)
    source = torch.ones(num_bytes, dtype=torch.uint8).split(sizes)
    seconds = best_of(repeats, lambda: [group.broadcast(bucket) for bucket in source])
    for child in children:
        child.wait()
    return seconds


def push_rows(
    folder: Path, transport: str, tp: int, most_servers: int, repeats: int, copy_s: float
) -> Iterator[dict[str, Any]]:
    """Rows for 1 ... `most_servers` servers, which are started once."""
    section = SECTION.model_copy(update={"tensor_parallel_size": tp, "weight_transport": transport})
    tensors = load_file(folder / "model.safetensors")
    metas = [TensorMeta.of(name, tensor) for name, tensor in tensors.items()]
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    servers = [
        VllmServer(
            section,
            model_path=folder,
            log_path=folder / f"{transport}-{tp}-{index}.log",
            served_name=SERVED_NAME,
            weight_transfer=transport,  # type: ignore[arg-type]
        )
        for index in range(most_servers)
    ]
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.close)
        start_servers(servers)
        for count in range(1, most_servers + 1):
            with ExitStack() as pools:
                pool = RolloutPool(
                    section, tokenizer=tokenizer, banned_ids=(), urls=[], servers=servers[:count],
                    transport=build_transport(section),
                )  # fmt: skip
                pools.callback(pool._pusher.close)  # type: ignore[union-attr]  # the servers go on to the next count
                pools.callback(pool.group.loop.close)
                versions = iter(range(1, 1000))
                seconds = best_of(
                    repeats,
                    lambda: pool.push_weights(metas, tensors.items(), version=next(versions)),  # noqa: B023
                )
                plain_s = plain_gloo_s(num_bytes, count * tp, section.weight_bucket_bytes, repeats)
            yield {
                "transport": transport,
                "MB": num_bytes / 1e6,
                "servers": count,
                "tp": tp,
                "push_s": seconds,
                "GB_per_s": num_bytes / seconds / 1e9,
                "of_memory_copy": copy_s / seconds,
                "of_plain_gloo": plain_s / seconds,
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["128x2", "768x8", "1536x8"], help="hidden size x layers")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--transports", nargs="+", default=["gloo", "ipc", *(["nccl"] * torch.cuda.is_available())])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 when the goal is missed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="weight-push-") as scratch:
        for size in options.sizes:
            hidden, layers = map(int, size.split("x"))
            folder = write_model(Path(scratch) / size, hidden_size=hidden, num_layers=layers)
            num_bytes = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
            copy_s = memory_copy_s(num_bytes, options.repeats)
            for transport in options.transports:
                for tp in options.tp:
                    rows += push_rows(folder, transport, tp, options.servers, options.repeats, copy_s)
                    print(rows[-1], file=sys.stderr)
    print_table(COLUMNS, rows)
    write_json(options.json, "weight_push", rows, goal=GOAL)
    largest = max(row["MB"] for row in rows)
    gloo = [row["of_plain_gloo"] for row in rows if row["transport"] == "gloo" and row["MB"] == largest]
    if gloo:
        print(f"gloo push of {largest:.0f} MB: at least {min(gloo):.2f} of a plain gloo broadcast (goal {GOAL:g})")
    return int(options.check and (not gloo or min(gloo) < GOAL))


if __name__ == "__main__":
    sys.exit(main())
