"""Share of an RL step in which rollout servers, judges and trainer ranks have nothing to do.

On a simulated cluster, in virtual time: 8 rollout servers, 2 judges, 8 data-parallel ranks. Lengths are those of a
record (`--record DIR`, of `rl.record`) or drawn; service times are the assumptions in SERVICE. Who trains on what is
decided by the product's own code.

    before                       generate all, then score all, then train; rollouts dealt to the ranks like cards
    after                        each is scored as it comes; spread over the ranks by cost
    after, sampler's log-probs   the same with algorithm.old_log_probs = "sampler"

On finished runs (`--run DIR`, more than once): their own `idle/*` metrics.

Usage: step_idle.py [--record DIR] [--run DIR]... [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reporting import print_table, write_json
from transformers import AutoConfig

from megatron_r1reward.data.balance import Cost, ModelCost, spread_over_ranks

MODEL = Path(__file__).parents[1] / "tests" / "data" / "qwen2_5_vl_7b"
SERVERS, JUDGES, RANKS, STEPS = 8, 2, 8, 5
PROMPTS, SAMPLES, MINI_BATCHES = 256, 4, 1
IDLE_GROUPS, RIGHT = 0.3, 0.6  # groups whose samples all earned the same; right answers, which the judge is asked about
SERVICE = {
    "rollout_slots": 128,  # sequences that a server decodes at once
    "iteration_s": 0.012,  # one token of every running sequence, and what each of them adds
    "iteration_per_sequence_s": 0.00015,
    "prefill_s": 0.05,  # one prompt with its image
    "judge_slots": 32,
    "judge_call_s": 1.0,  # mean; log-normal with sigma 0.5
    "trainer_gflops_per_s": 350_000.0,  # of one data-parallel rank
    "push_s": 3.0,
}
SPEEDUP, IMBALANCE = 1.2, 1.02  # goals


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One rollout: its prompt's number, lengths, and what became of it."""

    prompt: int
    tokens: int  # prompt, image placeholders expanded
    patches: int
    response: int
    judge_s: float | None  # None: a wrong answer, nobody asks
    idle: bool


def drawn(seed: int) -> list[Sample]:
    """Images of 0.05 to 0.5 megapixels, some hundred words, responses of some 600 tokens."""
    random = np.random.default_rng(seed)
    samples = []
    for prompt in range(PROMPTS):
        patches, text = int(random.integers(256, 2560)), int(random.lognormal(6.2, 0.6))
        lengths = np.clip(random.lognormal(6.3, 0.5, SAMPLES), 20, 2048).astype(int)
        samples += _group(prompt, text + patches // 4, patches, lengths, random)
    return samples


def _group(prompt: int, tokens: int, patches: int, lengths: Sequence[int], random: np.random.Generator) -> list[Sample]:
    idle = bool(random.random() < IDLE_GROUPS)
    calls = random.lognormal(np.log(SERVICE["judge_call_s"]) - 0.125, 0.5, len(lengths))
    rights = random.random(len(lengths)) < RIGHT
    return [
        Sample(prompt=prompt, tokens=tokens, patches=patches, response=int(length),
               judge_s=float(call) if right else None, idle=idle)
        for length, call, right in zip(lengths, calls, rights, strict=True)
    ]  # fmt: skip


def recorded(folder: Path) -> list[list[Sample]]:
    """Steps of a record: its lengths and right answers. An image counts as half a megapixel: a record holds none."""
    steps = []
    for number, path in enumerate(sorted(folder.glob("step-*.jsonl"))):
        random, samples = np.random.default_rng(number), list[Sample]()
        rows = map(json.loads, path.read_text().splitlines()[1:])
        for prompt, (_, group) in enumerate(itertools.groupby(rows, key=lambda row: row["rollout"]["prompt"]["id"])):
            members = list(group)
            asked = members[0]["rollout"]["prompt"]
            patches = 2500 * len(asked["image_paths"])
            results = {row["reward"] for row in members}
            for row, call in zip(members, random.lognormal(-0.125, 0.5, len(members)), strict=True):
                samples.append(
                    Sample(prompt=prompt, tokens=len(asked["token_ids"]) + patches // 4, patches=patches,
                           response=len(row["rollout"]["token_ids"]), idle=len(members) > 1 and len(results) == 1,
                           judge_s=SERVICE["judge_call_s"] * float(call) if row["result_reward"] else None)
                )  # fmt: skip
        steps.append(samples)
    return steps


def generate(samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """When each sample is there, and how long each server worked. A server decodes all its sequences in step; the next
    prompt goes to the server with the fewest."""
    queues: list[list[int]] = [[] for _ in range(SERVERS)]
    for prompt in sorted({sample.prompt for sample in samples}):
        members = [i for i, sample in enumerate(samples) if sample.prompt == prompt]
        min(queues, key=len).extend(members)
    done, busy = [0.0] * len(samples), []
    for queue in queues:
        now, progress, running, waiting = 0.0, 0, list[tuple[int, int]](), list(reversed(queue))
        while running or waiting:
            while waiting and len(running) < SERVICE["rollout_slots"]:
                index = waiting.pop()
                heapq.heappush(running, (progress + samples[index].response, index))
                now += SERVICE["prefill_s"] / SAMPLES
            ends, index = heapq.heappop(running)
            active = len(running) + 1
            now += (ends - progress) * (SERVICE["iteration_s"] + SERVICE["iteration_per_sequence_s"] * active)
            progress, done[index] = ends, now
        busy.append(now)
    return done, busy


def arrival(samples: Sequence[Sample], done: Sequence[float]) -> list[float]:
    """A prompt's samples come back together."""
    last: dict[int, float] = {}
    for sample, end in zip(samples, done, strict=True):
        last[sample.prompt] = max(last.get(sample.prompt, 0.0), end)
    return [last[sample.prompt] for sample in samples]


def judge(samples: Sequence[Sample], asked_at: Sequence[float]) -> tuple[float, float]:
    """When the last verdict is there, and the time for which a judge had a call in flight (both together)."""
    free = [(0.0, n % JUDGES) for n in range(JUDGES * int(SERVICE["judge_slots"]))]
    heapq.heapify(free)
    calls: list[list[tuple[float, float]]] = [[] for _ in range(JUDGES)]
    for at, sample in sorted(zip(asked_at, samples, strict=True), key=lambda pair: pair[0]):
        if sample.judge_s is not None:
            begin, server = heapq.heappop(free)
            end = max(begin, at) + sample.judge_s
            calls[server].append((max(begin, at), end))
            heapq.heappush(free, (end, server))
    return max((end for server in calls for _, end in server), default=0.0), sum(map(_covered, calls))


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    total = reached = 0.0
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def dealt(total: int, mini_batches: int) -> list[list[list[int]]]:
    return [
        [part[rank::RANKS].tolist() for rank in range(RANKS)] for part in np.array_split(np.arange(total), mini_batches)
    ]


def train(
    costs: Sequence[Cost], idle: Sequence[bool], shards: list[list[list[int]]], *, log_probs: bool
) -> tuple[float, float]:
    """Seconds of the trainer, and those that a rank worked on average: log-probs of all, then each update, forward and
    twice that backward. Ranks meet after the log-probs and after every optimizer step."""

    def load(members: Sequence[int]) -> float:
        images = {costs[i].images_key: costs[i].images for i in members}
        return (sum(costs[i].own for i in members) + sum(images.values())) / SERVICE["trainer_gflops_per_s"]

    phases = [[load([i for part in shards for i in part[rank]]) for rank in range(RANKS)]] if log_probs else []
    phases += [[3 * load([i for i in members if not idle[i]]) for members in part] for part in shards]
    return sum(map(max, phases)), sum(sum(loads) / RANKS for loads in phases)


def simulate(samples: Sequence[Sample], *, after: bool, log_probs: bool) -> dict[str, Any]:
    """One step."""
    price = ModelCost.of(AutoConfig.from_pretrained(MODEL))
    costs = [
        price(tokens=s.tokens + s.response, response_tokens=s.response, patches=s.patches, images_key=s.prompt)
        for s in samples
    ]
    idle = [sample.idle for sample in samples]
    done, servers = generate(samples)
    sampled = max(done)
    arrived = arrival(samples, done)
    verdicts, judging = judge(samples, arrived if after else [sampled] * len(samples))
    shards = dealt(len(samples), MINI_BATCHES)
    if after:
        shards, _ = spread_over_ranks(costs, idle, mini_batches=MINI_BATCHES, ranks=RANKS)
    training, working = train(costs, idle, shards, log_probs=log_probs)
    seconds = max(sampled, verdicts) + training + SERVICE["push_s"]
    return {
        "step s": seconds,
        "idle generation": 1 - sum(servers) / SERVERS / seconds,
        "idle judge": 1 - judging / JUDGES / seconds,
        "idle trainer": 1 - (working + SERVICE["push_s"]) / seconds,
        "slowest / mean": training / working,
        "scoring after sampling s": max(0.0, verdicts - sampled),
        "content": [sorted(i for members in part for i in members) for part in shards],
    }


def of_run(folder: Path) -> dict[str, Any]:
    """Means over the steps of a finished run, without the first."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    rows = [row | one_after_the_other(row) if "idle/trainer" not in row else row for row in rows]
    names = {"step s": "time/step", "idle generation": "idle/generation", "idle judge": "idle/judge",
             "idle trainer": "idle/trainer", "slowest / mean": "update/imbalance",
             "scoring after sampling s": "time/score"}  # fmt: skip
    found = {column: [row[name] for row in rows if name in row] for column, name in names.items()}
    return {"case": str(folder), **{column: float(np.mean(values)) for column, values in found.items() if values}}


def one_after_the_other(row: dict[str, float]) -> dict[str, float]:
    """Idle shares of a step of version 0.1 and before, which recorded none: all sampled, then all scored, then
    trained, so whoever's phase it is not waits."""
    step, trainer = row["time/step"], ("time/log_probs", "time/update", "time/push")
    return {
        "idle/generation": 1 - row["time/generate"] / step,
        "idle/judge": 1 - row["time/score"] / step,
        "idle/trainer": 1 - sum(row.get(name, 0.0) for name in trainer) / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--run", type=Path, action="append", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    steps = recorded(arguments.record) if arguments.record else [drawn(seed) for seed in range(STEPS)]
    cases = {"before": (False, True), "after": (True, True), "after, sampler's log-probs": (True, False)}
    rows, contents = [], []
    for name, (after, log_probs) in cases.items():
        found = [simulate(samples, after=after, log_probs=log_probs) for samples in steps]
        contents.append([step.pop("content") for step in found])
        means = {key: float(np.mean([step[key] for step in found])) for key in found[0]}
        rows.append({"case": f"simulated, {name}"} | means)
    assert contents[0] == contents[1] == contents[2], "an optimizer step trains on the same rollouts"
    speedups = [rows[0]["step s"] / row["step s"] for row in rows[1:]]
    rows += map(of_run, arguments.run)
    print_table(list(rows[0]), rows)
    lengths = str(arguments.record) if arguments.record else "drawn"
    write_json(arguments.json, "step_idle", rows, service_times_assumed=SERVICE, lengths=lengths, speedups=speedups,
               servers=SERVERS, judges=JUDGES, ranks=RANKS, prompts=PROMPTS, samples_per_prompt=SAMPLES,
               idle_groups=IDLE_GROUPS, virtual_time=True)  # fmt: skip
    print(f"simulated: {speedups[0]:.2f}, with the sampler's log-probs {speedups[1]:.2f} times fewer seconds per step "
          f"(goal {SPEEDUP})")  # fmt: skip
    if arguments.check and (max(speedups) < SPEEDUP or rows[1]["slowest / mean"] > IMBALANCE):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
