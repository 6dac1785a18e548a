"""What the service costs beside bare vLLM: pairs per second through /v1/compare and straight from the server.

One vLLM server, 64 clients. Every pair is judged greedily in both orders with the log-probs of the answer: by the
service (a process of its own, `r1reward serve URL`), and by chat requests to the server itself with the very same
prompts and settings: all 128 at once, and 64 at a time as the service sends them. They take turns, so that a busy
moment of the machine meets all; the server's caches of prefixes and images are off, so that none profits from another.
Goal: the service gives at least 85 % of what the bare server does, the better way of the two.

    make demo
    python benchmarks/serving_throughput.py [--model runs/demo/rl/hf] [--pairs 256] [--rounds 5] [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from reporting import print_table, write_json

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.demo.digits import write_candidates
from megatron_r1reward.judging.ask import AskOptions, Item
from megatron_r1reward.judging.served import asked_by, policy_of
from megatron_r1reward.network.tokens import bearer
from megatron_r1reward.reward.rules import parse_response
from megatron_r1reward.servers.command import sees_gpu
from megatron_r1reward.servers.process import VllmServer, start_servers

CLIENTS = 64
AT_ONCE = (2 * CLIENTS, AskOptions.concurrency)  # bare requests in flight
GOAL = 0.85
MAX_TOKENS = 64
Verdicts = tuple[int | None, int | None]  # of the two orders, as the responses were shown
Round = tuple[float, list[Verdicts]]  # seconds, verdicts by pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    item: Item
    responses: tuple[str, str]


def read_pairs(folder: Path, count: int) -> list[Pair]:
    """Pairs of answers about held-out digits, four of each image."""
    write_candidates(folder / "candidates.jsonl", rows=-(-count // 4), candidates=8)
    rows = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
    pairs = []
    for row in rows:
        item = Item.of(row["question"], [folder / image for image in row["images"]])
        texts = row["responses"]
        pairs += [Pair(item=item, responses=(texts[i], texts[i + 1])) for i in range(0, 8, 2)]
    return pairs[:count]


async def all_pairs(pairs: Sequence[Pair], judge: Callable[[Pair], Awaitable[Verdicts]]) -> Round:
    """Seconds and verdicts, `CLIENTS` pairs at a time."""
    slots = asyncio.Semaphore(CLIENTS)

    async def one(pair: Pair) -> Verdicts:
        async with slots:
            return await judge(pair)

    started = time.perf_counter()
    verdicts = await asyncio.gather(*map(one, pairs))
    return time.perf_counter() - started, list(verdicts)


async def bare_round(server: VllmServer, pairs: Sequence[Pair], options: AskOptions, at_once: int) -> Round:
    slots = asyncio.Semaphore(at_once)
    async with client(server.url, bearer(server.token)) as http:

        async def ask(pair: Pair, shown: tuple[str, str]) -> int | None:
            body = {
                "model": server.served_name,
                "messages": options.prompt.messages(pair.item.question, shown, pair.item.images),
                "temperature": 0.0, "max_tokens": MAX_TOKENS, "logprobs": True, "top_logprobs": 5,
            }  # fmt: skip
            async with slots:
                reply = await http.post("/v1/chat/completions", json=body)
            answer = reply.raise_for_status().json()
            return parse_response(answer["choices"][0]["message"]["content"]).answer

        async def judge(pair: Pair) -> Verdicts:
            first, second = await asyncio.gather(ask(pair, pair.responses), ask(pair, pair.responses[::-1]))
            return first, second

        return await all_pairs(pairs, judge)


async def service_round(url: str, pairs: Sequence[Pair]) -> Round:
    async with client(url, {}) as http:

        async def judge(pair: Pair) -> Verdicts:
            body = {
                "question": pair.item.question, "responses": list(pair.responses), "images": list(pair.item.images)
            }  # fmt: skip
            answer = (await http.post("/v1/compare", json=body)).raise_for_status().json()
            texts = {one["order"]: parse_response(one["text"]).answer for one in answer["judgements"]}
            return texts["12"], texts["21"]

        return await all_pairs(pairs, judge)


def client(url: str, headers: dict[str, str]) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=2 * CLIENTS, max_keepalive_connections=2 * CLIENTS)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits, trust_env=False)


@contextmanager
def service(server: VllmServer, folder: Path) -> Iterator[str]:
    """`r1reward serve` before the server, in a process of its own; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "megatron_r1reward.cli", "serve", server.url, "--port", str(port)]
    command += ["--max-tokens", str(MAX_TOKENS), "--concurrency", str(2 * CLIENTS), "--prompt-of", str(folder)]
    process = subprocess.Popen(command, env={**os.environ, "R1REWARD_SERVER_TOKEN": server.token})
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the service ended with exit code {process.returncode}")
            try:
                if httpx.get(f"{url}/ready", timeout=5, trust_env=False).is_success:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per round; the side that begins changes from round to round."""
    policy = policy_of(options.model)
    asked = asked_by(policy, AskOptions(max_tokens=MAX_TOKENS))
    section = ServerSection(
        max_model_len=1024, max_num_seqs=128, dtype=options.dtype,
        kv_cache_bytes=None if sees_gpu() else 1 << 28,
        extra_args=("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"),
    )  # fmt: skip
    pairs = read_pairs(folder, options.pairs)
    pixels = None if policy is None else policy.pixels
    server = VllmServer(section, model_path=options.model, log_path=folder / "vllm.log", pixels=pixels)
    rows: list[dict[str, Any]] = []
    try:
        start_servers([server], print)
        with service(server, options.model) as url:
            for number in range(options.rounds + 1):  # the first one warms up
                sides: list[tuple[str, Callable[[], Coroutine[Any, Any, Round]]]] = [
                    (f"bare, {n}", functools.partial(bare_round, server, pairs, asked, n)) for n in AT_ONCE
                ]
                sides.append(("service", functools.partial(service_round, url, pairs)))
                found = {name: asyncio.run(run()) for name, run in (sides if number % 2 else sides[::-1])}
                same = sum(a == b for a, b in zip(found[sides[0][0]][1], found["service"][1], strict=True))
                rates = {name: len(pairs) / seconds for name, (seconds, _) in found.items()}
                best = max(rate for name, rate in rates.items() if name != "service")
                row = {"round": number, **rates, "share": rates["service"] / best, "same": same / len(pairs)}
                rows += [row] if number else []
    finally:
        server.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/rl/hf"))
    parser.add_argument("--dtype", default="auto" if sees_gpu() else "float32")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit code 1 when the goal is missed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(options, Path(scratch))
    print_table(("round", *(f"bare, {n}" for n in AT_ONCE), "service", "share", "same"), rows)
    share = statistics.median(row["share"] for row in rows)
    same = min(row["same"] for row in rows)
    write_json(options.json, "serving_throughput", rows, pairs=options.pairs, clients=CLIENTS, share=share, goal=GOAL)
    print(f"/v1/compare gives {share:.0%} of the pairs per second of bare vLLM (median of {len(rows)} rounds)")
    if options.check and (share < GOAL or same < 0.99):
        sys.exit(1)


if __name__ == "__main__":
    main()
