"""SFT steps and an RL run from a record, of the real trainer with random weights: time, memory against `plan`, and the
LM head's share.

    python benchmarks/gpu_training.py [--size tiny|mid] [--ranks 1|2] [--json FILE] [--check] [--dry-run]

One rank works over NCCL; two share GPU 0 over gloo's CUDA backend, which NCCL refuses. RL trains through `rl.replay` on
rollouts that are made up here, so neither servers nor vLLM are needed. `--dry-run`: on the tests' second device, whose
tensors compute on the CPU and obey a GPU's rules.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from forked_ranks import run_ranks  # noqa: E402
from reporting import print_table, write_json  # noqa: E402

TOKENS = 8192  # of one packed micro-batch
GOAL = 0.10  # of the measured peak: how far the plan may be off
STEPS = 3


def on_rank(folder: Path, scratch: Path, size: str, shared: bool, dry_run: bool) -> list[dict[str, Any]]:
    """Both stages on this rank; the rows of the table."""
    if not dry_run:
        return measured(folder, scratch, size, shared)
    import second_device

    second_device.install()
    with second_device.Rules():
        return measured(folder, scratch, size, shared)


def measured(folder: Path, scratch: Path, size: str, shared: bool) -> list[dict[str, Any]]:
    import workload
    from precision_training import SHAPE, TINY_SHAPE

    if shared:
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group("gloo")
    sections = run_sections(folder, scratch, int(os.environ.get("WORLD_SIZE", "1")))
    state = workload.build(folder, TOKENS, **sections)
    shape = TINY_SHAPE if size == "tiny" else SHAPE
    sequences = workload.sequences(state, shape, scratch / f"images-{state.topology.rank}")
    rows = [sft_row(state, sequences)]
    config, topology = state.config, state.topology
    del state
    rows.append(rl_row(config, topology, sequences, scratch))
    return [{"size": size, "ranks": topology.world_size, "backend": dist.get_backend(), **row} for row in rows]


def run_sections(folder: Path, scratch: Path, ranks: int) -> dict[str, Any]:
    return {
        "run": {"output_dir": str(scratch / "run")},
        "model": {"path": str(folder), "precision": "bf16"},
        "data": {"train": str(scratch / "no-data.jsonl"), "token_budget": TOKENS, "max_pixels": 28 * 28 * 1024},
        "optimizer": {"lr": 1e-5, "warmup_fraction": 0.0, "schedule": "constant"},
        "parallel": {"use_distributed_optimizer": ranks == 1},  # gloo has no reduce-scatter for CUDA tensors
        "rl": {"steps": STEPS, "rollout_batch_size": 4, "train_batch_size": 4, "replay": str(scratch / "record")},
        "algorithm": {"samples_per_prompt": 2, "mismatch_alarm": 100.0, "mismatch_share_alarm": 1.0},
        "reward": {"use_judge": False},
        "checkpoint": {"save_every": 1_000},
        "monitor": {"tensorboard": False},
    }


@contextmanager
def peak_bytes(found: list[int]) -> Iterator[None]:
    """The highest number of allocated bytes meanwhile; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        found.append(torch.cuda.max_memory_allocated())


def planned_bytes(config: Any, world_size: int, sequences: Sequence[Any], *, fused_loss: bool) -> float:
    """What the planner says about a step over these sequences in one micro-batch."""
    from megatron_r1reward.model_folder.shape import read_shape
    from megatron_r1reward.planner.memory import Numerics, stage_activations, state_bytes
    from megatron_r1reward.planner.parameters import stage_tensors
    from megatron_r1reward.planner.planned_layout import trainer_layout
    from megatron_r1reward.planner.workload import MicroBatch

    shape = read_shape(json.loads((config.model.path / "config.json").read_text()))
    layout = trainer_layout(shape, config.parallel, world_size)
    numerics = Numerics(width=2, fused_norm=torch.cuda.is_available())
    held = state_bytes(stage_tensors(shape, layout, 0), layout, numerics.width)
    images = sum(sum(token == config_image_token(config) for token in s.token_ids) for s in sequences)
    batch = MicroBatch(
        name="measured",
        tokens=sum(len(s.token_ids) for s in sequences),
        sequences=len(sequences),
        patches=images * shape.vision.unit,
        responses=sum(s.response_length for s in sequences),
        longest=max(len(s.token_ids) for s in sequences),
    )
    activations = stage_activations(shape, layout, numerics, batch, stage=0, micro_batches=1, fused_loss=fused_loss)
    return float(sum(asdict(held).values()) + activations.total)


def config_image_token(config: Any) -> int:
    return int(json.loads((config.model.path / "config.json").read_text())["image_token_id"])


def largest(state: Any, sequences: Sequence[Any]) -> list[Any]:
    """The sequences of the micro-batch with most tokens."""
    plan = state.packer.plan(sequences, range(len(sequences)))
    return max(([sequences[i] for i in part] for part in plan), key=lambda p: sum(len(s.token_ids) for s in p))


def sft_row(state: Any, sequences: Sequence[Any]) -> dict[str, Any]:
    """Optimizer steps over all sequences; the first one allocates and is not timed."""
    from megatron_r1reward.training.schedule import reduce_statistics, train_micro_batches
    from megatron_r1reward.training.sft import cross_entropy

    mine = list(sequences[state.topology.data_parallel_rank :: state.topology.data_parallel_size])
    plan = state.packer.plan(mine, range(len(mine)))
    losses, seconds, peaks = [], [], []
    for _ in range(STEPS):
        with peak_bytes(peaks):
            started = time.perf_counter()
            statistics, outcome = train_micro_batches(state, mine, plan, cross_entropy)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        assert not outcome.skipped, f"gradient norm {outcome.grad_norm}"
        total = reduce_statistics(state, statistics)
        losses.append(total["loss"] / total["tokens"])
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    tokens = sum(len(s.token_ids) for s in mine)
    planned = planned_bytes(state.config, state.topology.world_size, largest(state, mine), fused_loss=False)
    row = {"stage": "sft", "loss": losses[-1], "step s": min(seconds), "tokens/s": tokens / min(seconds)}
    return row | memory(peaks[1:], planned) | {"LM head %": None}


def memory(peaks: list[int], planned: float) -> dict[str, Any]:
    measured = max(peaks) if peaks else None
    off = None if measured is None else 100 * (planned - measured) / measured
    return {"peak GiB": None if measured is None else measured / 2**30, "planned GiB": planned / 2**30, "off %": off}


class HeadClock:
    """Seconds inside the LM head's forward, which forms loss and gradients in an update."""

    def __enter__(self) -> HeadClock:
        from megatron_r1reward.models.head import ResponseHead

        self._spans: list[tuple[Any, Any]] = []
        hooks = torch.nn.modules.module

        def before(module: Any, _: Any) -> None:
            if isinstance(module, ResponseHead):
                self._spans.append((self._now(), None))

        def after(module: Any, *_: Any) -> None:
            if isinstance(module, ResponseHead):
                self._spans[-1] = (self._spans[-1][0], self._now())

        self._handles = [
            hooks.register_module_forward_pre_hook(before),
            hooks.register_module_forward_hook(after),
        ]
        return self

    @staticmethod
    def _now() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def seconds(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in self._spans) / 1e3
        return sum(end - start for start, end in self._spans)


def write_record(config: Any, sequences: Sequence[Any]) -> None:
    """Rollouts that nobody sampled: the sequences' prompts, two responses each, right and wrong in turn."""
    from megatron_r1reward.reward.score import RewardScorer
    from megatron_r1reward.rollout.accounting import Accounting
    from megatron_r1reward.training.record import Recorder, origin_of
    from megatron_r1reward.training.step_sampler import GeneratedStep, StepRollouts
    from megatron_r1reward.types import Prompt, Rollout, WeightSpan

    image = config_image_token(config)
    recorder = Recorder(config.rl.replay, origin_of(config, {}), resumed_step=None)
    scorer = RewardScorer(config.reward, None)
    for step in range(config.rl.steps):
        rollouts = []
        for number in range(config.rl.rollout_batch_size):
            sequence = sequences[number % len(sequences)]
            ids = sequence.token_ids[: sequence.prompt_length]
            first = ids.index(image)  # one placeholder stands for the image until the trainer expands it
            prompt = Prompt(
                id=f"{step}-{number}",
                preference_id=str(number),
                token_ids=(*ids[: first + 1], *(token for token in ids[first + 1 :] if token != image)),
                image_paths=sequence.image_paths,
                label=1,
                swapped=False,
            )
            response = sequence.token_ids[sequence.prompt_length :]
            for sample in range(config.algorithm.samples_per_prompt):
                rollouts.append(
                    Rollout(
                        prompt=prompt,
                        sample_index=sample,
                        token_ids=response[sample:] + response[:sample],
                        log_probs=(-5.5,) * len(response),
                        text=f"<think>made up</think><answer>{1 + (number + sample) % 2}</answer>",
                        finish_reason="stop",
                        weight_spans=(WeightSpan(version=step, start=0, end=len(response)),),
                    )
                )
        scored, counts = scorer.score(rollouts)
        generated = GeneratedStep(step=step, rollouts=(), accounting=Accounting(asked=len(rollouts)), seconds=0.0)
        recorder.write(StepRollouts(generated=generated, scored=tuple(scored), counts=counts, seconds=0.0))


def rl_row(config: Any, topology: Any, sequences: Sequence[Any], scratch: Path) -> dict[str, Any]:
    """The stage as it is, on the record."""
    from megatron_r1reward.training import rl

    if topology.is_main:
        write_record(config, sequences)
    if topology.world_size > 1:
        dist.barrier()
    peaks: list[int] = []
    with HeadClock() as clock, peak_bytes(peaks):
        rl.run(config, topology, None)
    if not topology.is_main:
        return {}
    lines = (scratch / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == STEPS, f"{len(steps)} of {STEPS} steps are in metrics.jsonl"
    last = steps[-1]
    per_rank = config.rl.train_batch_size * config.algorithm.samples_per_prompt // topology.data_parallel_size
    longest = sorted(sequences, key=lambda s: len(s.token_ids))
    fits, batch = TOKENS, []
    while longest and len(batch) < per_rank and len(longest[-1].token_ids) <= fits:
        batch.append(longest[-1])
        fits -= len(longest.pop().token_ids)
    total = sum(step["time/step"] for step in steps)
    row = {"stage": "rl from a record", "loss": last["loss"], "step s": min(step["time/step"] for step in steps)}
    row |= {"tokens/s": last["tokens_per_second"]}
    row |= memory(peaks, planned_bytes(config, topology.world_size, batch or sequences[:1], fused_loss=True))
    return row | {"LM head %": 100 * clock.seconds / total}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "mid"), default="tiny")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help=f"exit 1 when a plan is off by more than {GOAL:.0%}")
    arguments = parser.parse_args()
    import workload
    from precision_training import MID, TINY

    from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint

    with tempfile.TemporaryDirectory(prefix="gpu-training-") as root:
        folder = Path(root) / "model"
        spec = TINY if arguments.size == "tiny" else MID
        write_tiny_checkpoint(folder, corpus=workload.CORPUS, init_std=0.02, spec=spec)
        given = (folder, Path(root), arguments.size, arguments.ranks > 1, arguments.dry_run)
        rows = run_ranks(on_rank, arguments.ranks, *given, timeout_s=280.0)[0]
    print_table(list(rows[0]), rows)
    write_json(arguments.json, "gpu_training", rows, dry_run=arguments.dry_run)
    off = [abs(row["off %"]) for row in rows if row["off %"] is not None]
    print(f"{len(rows)} stages ran; the plan is off by at most {max(off):.1f} %" if off else f"{len(rows)} stages ran")
    return int(arguments.check and bool(off) and max(off) > 100 * GOAL)


if __name__ == "__main__":
    sys.exit(main())
