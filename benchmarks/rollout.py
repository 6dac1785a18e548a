"""What the rollout client costs beside bare vLLM, and whether the trainer's memory stays flat.

1. The same prompts, 64 at once, through `RolloutPool` and one server, and offline through `vllm.LLM` in a process of
   its own, with equal settings, in turns, so that a busy moment of the machine meets both. Goal: ours takes less than
   10 % longer.
2. Many rollouts through one pool. Goal: resident memory of this process grows by less than 2 % after the first fifth.

    python benchmarks/rollout.py [--rollouts 10000] [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from reporting import print_table, write_json
from servers import SECTION, write_model
from transformers import PreTrainedTokenizerFast

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.servers.build import SERVED_NAME
from megatron_r1reward.servers.command import server_environment
from megatron_r1reward.servers.process import VllmServer, start_servers
from megatron_r1reward.types import Prompt

CONCURRENT = 64
GOAL_OVERHEAD, GOAL_GROWTH = 0.10, 0.02
COLUMNS = ("measure", "value", "unit", "goal")

BARE = """
import json, sys, time
from vllm import LLM, SamplingParams
given = json.load(open(sys.argv[1]))
llm = LLM(model=given["model"], **given["engine"])
prompts = [{"prompt_token_ids": ids} for ids in given["prompts"]]
def once(seed):
    params = [SamplingParams(seed=seed * 1000 + i, logprobs=0, detokenize=False, ignore_eos=True, **given["sampling"])
              for i in range(len(prompts))]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(len(o.outputs[0].token_ids) == given["sampling"]["max_tokens"] for o in outputs)
    return time.perf_counter() - started
once(0)
for line in sys.stdin:  # one run per line
    print("RESULT", once(int(line)), flush=True)
"""


def prompts_of(tokenizer: Any, count: int, offset: int = 0) -> list[Prompt]:
    texts = [f"Which of the two responses is better? Question {offset + i}" for i in range(count)]
    return [
        Prompt(
            id=str(offset + i),
            preference_id=str(offset + i),
            token_ids=tuple(tokenizer(text)["input_ids"]),
            image_paths=(),
            label=1,
            swapped=False,
        )
        for i, text in enumerate(texts)
    ]


@contextmanager
def bare_vllm(folder: Path, prompts: list[Prompt], max_tokens: int) -> Iterator[Callable[[int], float]]:
    """`vllm.LLM` in a process with the environment of our servers: seconds of one offline run with a seed."""
    engine = {
        "dtype": SECTION.dtype,
        "max_model_len": SECTION.max_model_len,
        "max_num_seqs": SECTION.max_num_seqs,
        "kv_cache_memory_bytes": SECTION.kv_cache_bytes,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 8192,
        "generation_config": "vllm",
        "limit_mm_per_prompt": {"video": 0},
    }
    given = folder / "bare.json"
    given.write_text(
        json.dumps(
            {
                "model": str(folder),
                "engine": engine,
                "prompts": [list(prompt.token_ids) for prompt in prompts],
                "sampling": {"temperature": 1.0, "max_tokens": max_tokens},
            }
        )
    )
    on_cpu = not torch.cuda.is_available()
    environment = server_environment(SECTION, token="unused", on_cpu=on_cpu, base=os.environ)
    log_path = folder / "bare.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", BARE, str(given)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def run(seed: int) -> float:
        process.stdin.write(f"{seed}\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("RESULT "):
                return float(line.removeprefix("RESULT "))
        raise RuntimeError(f"bare vLLM failed:\n{log_path.read_text()[-3000:]}")

    try:
        yield run
    finally:
        process.kill()
        process.wait()


def our_seconds(pool: RolloutPool, prompts: list[Prompt], max_tokens: int, seed: int) -> float:
    """One call of `generate`; end-of-turn tokens are banned, so every response has all its tokens."""
    started = time.perf_counter()
    result = pool.generate(prompts, SamplingSection(max_tokens=max_tokens), seed=seed)
    seconds = time.perf_counter() - started
    assert all(len(rollout.token_ids) == max_tokens for rollout in result.rollouts)
    assert len(result.rollouts) == len(prompts)
    return seconds


def memory_growth(pool: RolloutPool, tokenizer: Any, rollouts: int) -> tuple[float, float]:
    """(MB after the first fifth, relative growth from there to the end) over `rollouts` rollouts."""
    process = psutil.Process()
    warm = None
    for step in range(-(-rollouts // 256)):
        pool.generate(prompts_of(tokenizer, 256, offset=256 * step), SamplingSection(max_tokens=4), seed=step)
        if warm is None and 256 * step >= rollouts // 5:
            warm = process.memory_info().rss
    assert warm is not None
    return warm / 1e6, process.memory_info().rss / warm - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512x4", help="hidden size x layers")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hidden, layers = map(int, options.size.split("x"))
    with tempfile.TemporaryDirectory(prefix="rollout-") as scratch:
        folder = write_model(Path(scratch) / "model", hidden_size=hidden, num_layers=layers)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        prompts = prompts_of(tokenizer, CONCURRENT)
        server = VllmServer(SECTION, model_path=folder, log_path=folder / "server.log", served_name=SERVED_NAME)
        start_servers([server])
        with RolloutPool(SECTION, tokenizer=tokenizer, banned_ids={tokenizer.eos_token_id}, servers=[server]) as pool:
            with bare_vllm(folder, prompts, options.max_tokens) as run_bare:
                our_seconds(pool, prompts, options.max_tokens, seed=0)  # not counted
                turns = [
                    (run_bare(seed), our_seconds(pool, prompts, options.max_tokens, seed))
                    for seed in range(1, options.repeats + 1)
                ]
            bare, ours = (min(times) for times in zip(*turns, strict=True))
            megabytes, growth = memory_growth(pool, tokenizer, options.rollouts)
            print(pool.total)
    overhead = ours / bare - 1
    tokens = CONCURRENT * options.max_tokens
    rows = [
        {"measure": "bare vLLM", "value": tokens / bare, "unit": "tokens/s"},
        {"measure": "rollout pool", "value": tokens / ours, "unit": "tokens/s"},
        {"measure": "overhead", "value": overhead, "unit": "of bare", "goal": f"< {GOAL_OVERHEAD:g}"},
        {"measure": "memory after a fifth", "value": megabytes, "unit": "MB"},
        {"measure": "growth to the end", "value": growth, "unit": "of it", "goal": f"< {GOAL_GROWTH:g}"},
    ]
    print_table(COLUMNS, rows)
    write_json(options.json, "rollout", rows, size=options.size, rollouts=options.rollouts)
    print(f"client overhead {overhead:+.1%} of bare vLLM; memory {growth:+.2%} over {options.rollouts} rollouts")
    return int(options.check and (overhead >= GOAL_OVERHEAD or growth >= GOAL_GROWTH))


if __name__ == "__main__":
    sys.exit(main())
