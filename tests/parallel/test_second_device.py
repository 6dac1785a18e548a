"""Whole stages on the second device: what a GPU would refuse fails here, and the numbers are those of a single CPU.

SFT with a resume, its export, RL from that export with a resume, log-probs, update, held-out probe, pushes to servers
that sleep and wake, checkpoints: `sft.run` and `rl.run` as they are. All layouts, step by step, are in
`test_second_device_layouts.py`. The rollout servers are fakes
that refuse to sample while they sleep; everything on the trainer's side is real.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parallel_parity as parity
import pytest
import safetensors.torch
import torch
from fake_vllm import FakeVllm, Silent
from forked_ranks import run_ranks
from parity_layouts import CP2, PLAIN, SHARDED, SP, TP2, Layout
from waiting import wait_until

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch import stages
from megatron_r1reward.parallel import setup
from megatron_r1reward.reward.score import RewardScorer
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.training import rl, sft
from megatron_r1reward.training.schedule import train_micro_batches
from megatron_r1reward.training.sft import cross_entropy
from megatron_r1reward.types import TensorMeta
from megatron_r1reward.weight_sync.buckets import WeightSnapshot
from megatron_r1reward.weight_sync.senders import GroupTransport, NcclTransport
from megatron_r1reward.weight_sync.shared_memory import MemoryFile

pytestmark = pytest.mark.parallel

# Where the host may wait inside the micro-batch loop: by place, with the reason. None of them more often for more
# sequences or windows, see `test_the_host_waits_no_more_for_more_sequences_and_windows`.
ALLOWED_WAITS = {
    "kernels/": "which rows have a gradient, and need no product else: once per chunk of rows",
    "training/policy_update.py": "what an update reports, and its inputs, once per micro-batch",
    "training/sft.py::cross_entropy": "what a step reports, once per micro-batch",
    "training/rollout_batch.py::_collect": "log-probs leave the device, once per micro-batch",
    "training/data_parallel.py::finalize_gradients": "the global denominator, once per step",
    "models/base.py::place_images": "whether images and their placeholders agree, once per micro-batch",
    "models/qwen3_vl/model.py": "which rows are pictures', once per micro-batch",
    "models/qwen3_vl/layers.py::forward": "how many tokens go to which expert, once per layer (megatron-core)",
    "parallel/context.py::rows": "which response tokens this context-parallel rank holds, once per micro-batch",
    "training/schedule.py::run_micro_batches": "shapes for the next stage (megatron-core), once per micro-batch",
}
# Where other ranks wait while the main rank samples, scores and probes: over the hosts.
WAITING_FOR_MAIN = {"training/rl.py::take_rollouts", "training/heartbeat.py::stop_requested",
                    "parallel/setup.py::from_main"}  # fmt: skip
COMPARED = ("sft/loss", "loss", "grad_norm", "entropy", "ratio/mean", "mismatch/mean_abs", "advantage/std",
            "advantage/filtered_fraction", "heldout/accuracy")  # fmt: skip
CASES: dict[str, tuple[str, Layout]] = {
    "one rank, experts": ("qwen3_vl_moe", Layout(ranks=1, parallel={})),
    "DP2, plain optimizer": ("qwen2_5_vl", Layout(ranks=2, parallel=PLAIN)),
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Data files, and the images they name."""

    sft: Path
    pool: Path


@pytest.fixture(scope="module")
def inputs(parity_images: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    import scipy.stats  # noqa: F401  (once, for all ranks that evaluate)

    folder = Path(parity_images[0]).parent
    answers = ("The image shows 7.", "Response 1 is better.")
    chosen = []
    for i in range(6):
        content = [{"type": "image", "image": path} for path in parity_images[: i % 3]]
        content.append({"type": "text", "text": "Which digit is shown?"})
        message = json.dumps([{"role": "user", "content": content}])
        chosen.append({"id": f"s{i}", "message": message, "response": f"{answers[i % 2]} " * (1 + i % 3)})
    pairs = [
        {"id": f"p{i}", "question": "Which digit is shown?", "response_1": f"The image shows {i}.", "response_2": "8",
         "answer": str(1 + i % 2), "images": [parity_images[i % 3]]}
        for i in range(6)
    ]  # fmt: skip
    for name, rows in (("sft", chosen), ("pool", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Inputs(sft=folder / "sft.jsonl", pool=folder / "pool.jsonl")


class Answering(FakeVllm):
    """Answers with a verdict that depends on the seed."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        texts = [f"<think>{'digit ' * (1 + i)}</think><answer>{1 + i % 2}</answer>" for i in range(4)]
        self._answers = [tokenizer.encode(text) for text in texts]

    def choice(self, index: int, seed: int) -> dict[str, Any]:
        return super().choice(index, seed) | _choice_of(self._answers[seed % 4], self.version)


def _choice_of(ids: list[int], version: str) -> dict[str, Any]:
    return {
        "token_ids": ids,
        "logprobs": {"content": [{"token_id": token, "logprob": -2.0} for token in ids]},
        "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
    }


def _config(folder: Path, data: Path, output: Path, layout: Layout, steps: int, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"output_dir": str(output)},
            "model": {"path": str(folder), "precision": "fp32"} | layout.model,
            "data": {"train": str(data), "token_budget": 1500},
            "optimizer": {"lr": 1e-3, "warmup_fraction": 0.0, "schedule": "constant", "eps": 1e-5},
            "parallel": layout.parallel,
            "precision": layout.precision,
            "sft": {"steps": steps, "global_batch_size": 6},
            "rl": {"steps": steps, "rollout_batch_size": 4, "train_batch_size": 2, "heldout_every": 1,
                   "heldout_pairs": 2},
            "algorithm": {"samples_per_prompt": 2},
            "evaluation": {"data": str(data)},
            "reward": {"use_judge": False},
            "cluster": {"layout": "colocated"},
            "checkpoint": {"save_every": 1, "async_save": True},
            "monitor": {"tensorboard": False},
        }
        | sections
    )  # fmt: skip


@contextmanager
def _services(config: RunConfig, topology: setup.Topology) -> Iterator[rl.Services | None]:
    """On the main rank: a real pool over a fake server, asleep while the trainer is built."""
    if not topology.is_main:
        yield None
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    transport = Silent()
    transport.device = topology.device
    server = Answering(tokenizer)
    try:
        options = dict(tokenizer=tokenizer, banned_ids=(), transport=transport, sleep_level=1)
        with RolloutPool(config.rollout, urls=[server.url], **options) as pool:
            pool.sleep()
            probe = stages._heldout_probe(config, pool)
            yield rl.Services(pool=pool, scorer=RewardScorer(config.reward, None), probe=probe)
    finally:
        server.stop()


def both_stages(second: bool, folder: Path, inputs: Inputs, layout: Layout, root: Path) -> dict[str, Any]:
    """Each stage stops after a step and resumes for another; the numbers of the main rank, and where it waited."""
    if not second:
        return _both_stages(folder, inputs, layout, root)
    import second_device

    second_device.install()
    with second_device.Rules():
        numbers = _both_stages(folder, inputs, layout, root)
    return numbers | {"waits": set(second_device.waits), "collectives": set(second_device.collectives)}


def _both_stages(folder: Path, inputs: Inputs, layout: Layout, root: Path) -> dict[str, Any]:
    first = _config(folder, inputs.sft, root / "sft", layout, 1)
    topology = setup.initialize(first.parallel, seed=0)
    for steps in (1, 2):
        trained = sft.run(_config(folder, inputs.sft, root / "sft", layout, steps), topology)
    assert trained is not None
    for steps in (1, 2):
        config = _config(trained, inputs.pool, root / "rl", layout, steps)
        with _services(config, topology) as services:
            rl.run(config, topology, services)
    if not topology.is_main:
        return {}
    numbers = {}
    for stage in ("sft", "rl"):
        for line in (root / stage / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            numbers |= {f"{stage} {row['step']} {key}": row[key] for key in COMPARED if key in row}
        for file in (root / stage / "hf").glob("*.safetensors"):
            weights = safetensors.torch.load_file(file)
            numbers |= {f"{stage} {name}": weights[name].double().norm().item() for name in weights}
    return numbers


@pytest.fixture(scope="module")
def on_one_cpu(
    families: dict[str, Path], inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, float]]:
    """The numbers of a single process on the plain CPU, by family."""

    @cache
    def run(family: str) -> dict[str, float]:
        root = tmp_path_factory.mktemp("cpu")
        return run_ranks(both_stages, 1, False, families[family], inputs, Layout(ranks=1, parallel={}), root)[0]

    return run


@pytest.mark.parametrize("name", CASES)
def test_stages_run_on_a_device_with_the_numbers_of_a_cpu(name, families, inputs, on_one_cpu, tmp_path) -> None:
    family, layout = CASES[name]
    got = run_ranks(both_stages, layout.ranks, True, families[family], inputs, layout, tmp_path)
    waits, collectives = ({place for rank in got for place in rank.pop(name)} for name in ("waits", "collectives"))
    expected = on_one_cpu(family)
    assert got[0].keys() == expected.keys()
    for key, value in expected.items():
        assert got[0][key] == pytest.approx(value, rel=2e-4, abs=1e-5), key
    assert not {place for place in waits if not place.startswith(tuple(ALLOWED_WAITS))}
    assert not collectives & WAITING_FOR_MAIN, "the device would spin until the main rank comes"


class _DeviceOnly:
    """A broadcast group that takes what nccl takes."""

    def broadcast(self, tensor: torch.Tensor, ready: None) -> None:
        if tensor.device.type == "cpu":
            raise RuntimeError("nccl: tensors must be on the device")


class _Answers:
    """The servers' end of an exchange, which is done at once."""

    targets = ("server",)

    def start(self, path: str, bodies: Any) -> dict[str, Future[Any]]:
        done: Future[Any] = Future()
        done.set_result({})
        return {"server": done}


def _push_and_push_again() -> tuple[list[str], dict[int, int]]:
    """From the trainer's tensors, then from the snapshot, as for a server that restarts; what was pinned, and the waits
    of a push by the number of its buckets."""
    import second_device

    second_device.install()
    pinned, waits = [], {}
    MemoryFile.pin = lambda self: pinned.append(self.path)  # type: ignore[method-assign]  # this process is a fork
    transport = object.__new__(NcclTransport)  # which refuses to be made where there is no GPU
    GroupTransport.__init__(transport)
    transport.device = second_device.DEVICE
    transport._group = _DeviceOnly()  # type: ignore[assignment]
    for buckets in (2, 8):
        with second_device.Rules(), second_device.watching():
            tensors = [(f"layer.{i}", torch.randn(64, 8, device=second_device.DEVICE)) for i in range(buckets)]
            metas = [TensorMeta.of(name, tensor) for name, tensor in tensors]
            snapshot = WeightSnapshot()
            recording = snapshot.record(metas, tensors, version=1, bucket_bytes=2048, device=transport.device)
            second_device.waits.clear()
            transport.send(_Answers(), recording.update, recording)  # type: ignore[arg-type]
            waits[buckets] = second_device.waits.total()
            transport.send(_Answers(), recording.update, snapshot)  # type: ignore[arg-type]
            snapshot.close()
    return pinned, waits


def test_a_server_that_missed_a_push_gets_the_snapshot_through_the_device() -> None:
    ((pinned, waits),) = run_ranks(_push_and_push_again, 1)
    assert len(pinned) == 2, "the host's copy is written while buckets travel"
    assert waits[2] == waits[8], "no wait per bucket"


def _waits_of_micro_batches(folder: Path, images: tuple[str, ...], layout: Layout) -> list[dict[str, int]]:
    """Of one with two sequences and the smallest image, and of one with all sequences and images."""
    import second_device

    second_device.install()
    found = []
    with second_device.Rules():
        state, sequences = parity.build(folder, images, layout, 100_000)
        for indices in ([1, 4], list(range(8))):
            second_device.waits.clear()
            train_micro_batches(state, sequences, [indices], cross_entropy)
            found.append(dict(second_device.waits))
    return found


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2_5_vl", Layout(ranks=1, parallel={})),
        ("qwen3_vl_moe", Layout(ranks=2, parallel=TP2 | SP)),
        ("qwen2_5_vl", Layout(ranks=2, parallel=CP2 | SHARDED)),
    ],
    ids=["windows", "experts_sequence_parallel", "context_parallel"],
)
def test_the_host_waits_no_more_for_more_sequences_and_windows(family, layout, families, parity_images) -> None:
    for small, large in run_ranks(_waits_of_micro_batches, layout.ranks, families[family], parity_images, layout):
        assert small == large
        assert sum(small.values()) < 60


def _starts_after_the_servers_sleep(root: Path) -> bool:
    """The other rank says when it begins to build; the main rank still puts its servers to sleep."""
    began, config = root / "began", _config(root, root / "x", root, Layout(ranks=2, parallel={}), 1)

    @contextmanager
    def ranks(config: RunConfig, rendezvous: Path | None) -> Iterator[setup.Topology]:
        yield setup.initialize(config.parallel, seed=0)

    @contextmanager
    def open_services(config: RunConfig, *, supervised: bool) -> Iterator[Any]:
        with suppress(AssertionError):
            wait_until(began.exists, 2.0)  # a rank that does not wait for this one
        seen.append(began.exists())
        yield SimpleNamespace(pool=None, judge=None)

    def run(config: RunConfig, topology: setup.Topology, services: Any) -> None:
        began.touch()

    import megatron_r1reward.launch.trainer_ranks as ranks_module

    seen: list[bool] = []
    ranks_module.ranks, rl.run = ranks, run  # type: ignore[assignment]  # this process is a fork
    stages.open_rl_services, stages.RewardScorer = open_services, lambda *_, **__: None  # type: ignore[assignment,misc]
    stages._heldout_probe, stages.check_models = lambda *_: None, lambda *_: None  # type: ignore[assignment]
    stages.rl(config)
    return any(seen)


def test_no_rank_takes_memory_before_colocated_servers_sleep(tmp_path: Path) -> None:
    assert run_ranks(_starts_after_the_servers_sleep, 2, tmp_path) == [False, False]


def test_ranks_of_tests_see_no_gpu() -> None:
    """They are forked and meet over gloo; with a CUDA build of torch they would take nccl and GPU 0."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def _fail() -> None:
    raise RuntimeError("as it should")


def test_a_failed_run_leaves_nothing_that_a_later_fork_trips_over() -> None:
    """Its store has a thread in this process only: a child that collects it would wait for that thread for ever."""
    for _ in range(3):
        try:
            run_ranks(_fail, 2)
        except AssertionError as error:
            error.itself = error  # type: ignore[attr-defined]  # only the collector frees what the error holds
    assert run_ranks(gc.collect, 2, timeout_s=60)
