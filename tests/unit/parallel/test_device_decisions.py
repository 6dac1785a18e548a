"""Every place that decides by the device, and what a GPU takes there.

The tests run on a CPU, and on a second device that is neither: a branch for "cuda" is not run anywhere before the first
GPU. So each is listed, a new one fails the first test here, and each has a check that takes the GPU's side.
"""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import megatron_r1reward
from megatron_r1reward.checkpoint import dist as checkpoint
from megatron_r1reward.config.schema import ProfileSection, ServerSection
from megatron_r1reward.kernels import choose_kernel, lm_head
from megatron_r1reward.kernels.policy_loss.row_kernels import PolicyLossOptions
from megatron_r1reward.parallel import cpu, precision, setup, transformer
from megatron_r1reward.servers import command, sleep
from megatron_r1reward.training.loop import StepProfiler
from megatron_r1reward.weight_sync import broadcast_group, senders

PACKAGE = Path(megatron_r1reward.__file__).parent
TESTS = Path(__file__).parents[2]
# They describe other machines, or what is installed, not the device of this process.
OTHER_MACHINES = ("doctor/", "planner/", "config/")
GPU = torch.device("cuda", 1)
Gpu = pytest.MonkeyPatch
CHECKS: dict[str, Callable[[Gpu], None] | str] = {}  # by place; a string: the test that takes that side


def _decides(node: ast.AST) -> bool:
    match node:
        case ast.Compare(left=left, comparators=others):
            return any(isinstance(x, ast.Constant) and x.value in ("cpu", "cuda") for x in (left, *others))
        case ast.Attribute(attr="is_cuda"):
            return True
        case ast.Call(func=ast.Attribute(attr="is_available" | "is_initialized", value=ast.Attribute(attr="cuda"))):
            return True
    return False


def decisions() -> set[str]:
    found = set()
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith(OTHER_MACHINES):
            continue
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef) and any(_decides(node) for node in ast.walk(function)):
                found.add(f"{name}::{function.name}")
    return found


def check(*places: str) -> Callable[[Callable[[Gpu], None]], Callable[[Gpu], None]]:
    def add(function: Callable[[Gpu], None]) -> Callable[[Gpu], None]:
        CHECKS.update(dict.fromkeys(places, function))
        return function

    return add


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """torch says that there are two GPUs; nothing is ever put there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return monkeypatch


@pytest.mark.slow
def test_every_decision_is_listed() -> None:
    assert decisions() == CHECKS.keys()


@pytest.mark.parametrize("place", sorted(decisions()))
def test_what_a_gpu_takes(place: str, gpu: Gpu) -> None:
    found = CHECKS[place]
    if isinstance(found, str):
        file, _, name = found.partition("::")
        assert f"def {name}(" in (TESTS / file).read_text()
    else:
        found(gpu)


CHECKS["parallel/cpu.py::_names_cuda"] = "unit/parallel/test_device_decisions.py::test_what_the_adapter_calls_cuda"
# vLLM takes seconds to import: the sides of its workers are looked at where their servers run.
RECEIVER = "e2e/test_rollout_transports.py::test_what_workers_do_on_a_gpu"
for name in ("start_weight_update", "_load", "init_transfer_engine", "_incoming", "_receive"):
    CHECKS[f"weight_sync/vllm_worker.py::{name}"] = RECEIVER
# On the second device, which is no CPU either: buckets of its own, a pinned snapshot, and copies that nobody waits for.
SNAPSHOT = "parallel/test_second_device.py::test_a_server_that_missed_a_push_gets_the_snapshot_through_the_device"
for name in ("record", "_fill"):
    CHECKS[f"weight_sync/buckets.py::{name}"] = SNAPSHOT


def test_what_the_adapter_calls_cuda() -> None:
    assert all(map(cpu._names_cuda, (torch.device("cuda"), "cuda:1", 0)))
    assert not any(map(cpu._names_cuda, (torch.device("cpu"), "cpu", None, True)))


@check("parallel/cpu.py::install")
def _only_the_optimizer_is_adapted(gpu: Gpu) -> None:
    """Without Transformer Engine and Apex megatron-core saves torch's own Adam and cannot resume it."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    gpu.setattr(cpu, "_installed", [])
    for module in (optimizer, distributed):
        gpu.setattr(module, "Adam", torch.optim.AdamW)
    gpu.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", True)
    gpu.setattr(distributed, "HAVE_APEX_OR_TE", False)
    gpu.setattr(distributed, "USING_TE_OPTIMIZER", False)
    gpu.setattr(cpu, "_replace_cuda_functions", lambda: pytest.fail("torch.cuda is a GPU's own"))
    cpu.install()
    parameter = torch.nn.Parameter(torch.ones(2))
    made = optimizer.Adam([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    made.step()
    assert made.param_groups[0]["step"] == 1, "where megatron-core looks for it"
    assert distributed.HAVE_APEX_OR_TE
    assert cpu._installed == []


@check("parallel/setup.py::_init_process_group")
def _groups_are_nccls(gpu: Gpu) -> None:
    asked: list[str] = []
    gpu.setattr(setup.dist, "init_process_group", lambda backend, **_: asked.append(backend))
    setup._init_process_group(setup._Launch(rank=0, world_size=1, local_rank=0), None, timedelta(seconds=1))
    assert asked == ["nccl"]


@check("parallel/setup.py::device_of", "parallel/setup.py::initialize")
def _a_rank_has_a_gpu_of_its_own(gpu: Gpu) -> None:
    assert setup.device_of(1) == GPU
    with pytest.raises(ValueError, match="rank 2 of this machine sees 2 GPUs"):
        setup.device_of(2)
    gpu.setattr(torch.cuda, "device_count", lambda: 1)  # as where Slurm shows each task only its own
    assert setup.device_of(3) == torch.device("cuda", 0)


@check("parallel/transformer.py::common_arguments")
def _weights_are_made_on_the_gpu(gpu: Gpu) -> None:
    assert transformer.common_arguments(torch.bfloat16)["use_cpu_initialization"] is False


@check("parallel/precision.py::this_device")
def _precision_asks_the_gpu(gpu: Gpu) -> None:
    assert precision.this_device().capability == (9, 0)


@check("parallel/setup.py::to_device")
def _copies_are_pinned_and_nobody_waits(gpu: Gpu) -> None:
    pinned = SimpleNamespace(to=lambda device, non_blocking: (device, non_blocking))
    assert setup.to_device(SimpleNamespace(pin_memory=lambda: pinned), GPU) == (GPU, True)  # type: ignore[arg-type]


@check("checkpoint/dist.py::_cuda_state")
def _a_checkpoint_keeps_the_gpus_generator(gpu: Gpu) -> None:
    state = torch.arange(16, dtype=torch.uint8)
    gpu.setattr(torch.cuda, "get_rng_state", lambda: state)
    assert checkpoint._cuda_state() is state


@check("training/loop.py::__init__")
def _nsys_is_allowed(gpu: Gpu) -> None:
    StepProfiler(ProfileSection(start_step=1, tool="nsys"), output_dir=Path("-"), rank=0)


@check("training/loop.py::step")
def _kernels_are_profiled(gpu: Gpu) -> None:
    import megatron_r1reward.training.loop as profiling

    asked: list[Any] = []

    def profile(activities: list[Any]) -> Any:
        asked.extend(activities)
        return nullcontext(SimpleNamespace(export_chrome_trace=lambda _: None))

    gpu.setattr(profiling, "profile", profile)
    with tempfile.TemporaryDirectory() as name:
        profiler = StepProfiler(ProfileSection(start_step=1), output_dir=Path(name), rank=0)
        with profiler.step(1):
            pass
    assert profiling.ProfilerActivity.CUDA in asked


@check("servers/sleep.py::here")
def _what_sleeping_servers_free_is_the_gpus(gpu: Gpu) -> None:
    gpu.setattr(torch.cuda, "mem_get_info", lambda: (5, 10))
    memory = sleep.DeviceMemory.here()
    assert memory.is_exact
    assert memory.free_bytes() == 5


@check("servers/command.py::sees_gpu")
def _weights_go_over_nccl(gpu: Gpu) -> None:
    assert command.weight_transport(ServerSection()) == "nccl"
    assert command.weight_transport(ServerSection(), colocated=True) == "gloo"


@check("weight_sync/senders.py::__init__")
def _buckets_are_on_the_gpu(gpu: Gpu) -> None:
    transport = senders.IpcTransport()
    assert transport.device == GPU
    assert not transport.needs_memory_file
    assert senders.NcclTransport().device == GPU


@check("weight_sync/broadcast_group.py::__init__", "weight_sync/broadcast_group.py::begin")
def _every_worker_receives_for_itself(gpu: Gpu) -> None:
    said: dict[str, str] = {}
    store = SimpleNamespace(set=said.__setitem__, get=lambda key: said[key].encode())
    gpu.setattr(broadcast_group, "BroadcastGroup", lambda *_: SimpleNamespace())
    meeting = broadcast_group.Rendezvous(
        backend="nccl", host="h", port=1, rank_offset=1, world_size=2, timeout_s=1.0, once_per_host=True
    )
    inlet = broadcast_group.Inlet(store, meeting, 1, GPU)  # type: ignore[arg-type]
    assert said == {"machine/1": "of rank 1"}
    inlet.begin(100)
    assert inlet._arena is None, "no memory of the host is needed"


class _Cuda:
    """Streams that write down what is asked of them."""

    def __init__(self, gpu: Gpu, *, done_after: int = 2) -> None:
        self.log: list[str] = []
        self.asked = 0
        self.done_after = done_after
        self.default, self.own = (self._stream(name) for name in ("default", "own"))
        gpu.setattr(torch.cuda, "current_stream", lambda *_: self.default)
        gpu.setattr(torch.cuda, "Stream", lambda: self.own)
        gpu.setattr(torch.cuda, "device", lambda _: nullcontext())
        gpu.setattr(torch.cuda, "stream", lambda _: nullcontext())

    def _stream(self, name: str) -> Any:
        def record_event() -> Any:
            self.log.append(f"event of {name}")
            return SimpleNamespace(query=self._query, of=name)

        return SimpleNamespace(
            name=name,
            record_event=record_event,
            wait_event=lambda event: self.log.append(f"{name} waits for {event.of}"),
        )

    def _query(self) -> bool:
        self.asked += 1
        return self.asked > self.done_after


def _nccl_group(cuda: _Cuda, timeout_s: float) -> broadcast_group.BroadcastGroup:
    group = object.__new__(broadcast_group.BroadcastGroup)
    work = SimpleNamespace(wait=lambda: cuda.log.append("ordered"))
    group._group = SimpleNamespace(broadcast=lambda *_: work, abort=lambda: cuda.log.append("aborted"))
    group._store, group._stream, group._timeout_s = None, None, timeout_s
    return group


def _on_gpu(cuda: _Cuda) -> Any:
    return SimpleNamespace(
        is_cuda=True, device=GPU, record_stream=lambda stream: cuda.log.append(f"kept for {stream.name}")
    )


@check("weight_sync/broadcast_group.py::broadcast", "weight_sync/broadcast_group.py::filled")
def _broadcasts_have_a_stream_of_their_own(gpu: Gpu) -> None:
    cuda = _Cuda(gpu)
    tensor = _on_gpu(cuda)
    _nccl_group(cuda, 60.0).broadcast(tensor, broadcast_group.filled(tensor))
    assert cuda.log == ["event of default", "own waits for default", "ordered", "event of own", "kept for own"]
    assert cuda.asked == 3, "the host asks, and does not wait in CUDA"


def test_a_peer_that_never_answers_ends_the_wait_before_torchs_watchdog(gpu: Gpu) -> None:
    cuda = _Cuda(gpu, done_after=1 << 60)
    group = _nccl_group(cuda, 0.0)
    with pytest.raises(RuntimeError, match="a peer has not answered within 0 s"):
        group.broadcast(_on_gpu(cuda))
    assert cuda.log[-1] == "aborted"
    with pytest.raises(RuntimeError, match="closed"):
        group.broadcast(_on_gpu(cuda))


@check("kernels/lm_head.py::default_chunk_rows")
def _chunks_are_a_gpus(gpu: Gpu) -> None:
    assert lm_head.default_chunk_rows(151_936, GPU, torch.float32) == lm_head.GPU_CHUNK_ROWS


def _matrix(dtype: torch.dtype) -> Any:
    found = SimpleNamespace(dtype=dtype, device=GPU, shape=(2, 2), t=lambda: found)
    return found


@check("kernels/lm_head.py::logits")
def _one_product_with_a_wider_result(gpu: Gpu) -> None:
    asked: list[Any] = []
    gpu.setattr(torch, "mm", lambda *_, **options: asked.append(options["out_dtype"]))
    gpu.setattr(lm_head, "LogitRows", lambda **_: None)
    buffer = type("Buffer", (), {"__getitem__": lambda self, _: SimpleNamespace(dtype=torch.float32)})()
    head = SimpleNamespace(excluded_columns=None, shard=None, options=lm_head.HeadOptions())
    lm_head.Head.logits(head, _matrix(torch.bfloat16), _matrix(torch.bfloat16), None, buffer)  # type: ignore[arg-type]
    assert asked == [torch.float32]


@check("kernels/lm_head.py::add_weight_gradient_")
def _one_product_with_a_float32_sum(gpu: Gpu) -> None:
    asked: list[Any] = []
    gpu.setattr(torch, "addmm", lambda *_, **options: asked.append(options["out_dtype"]))
    lm_head.add_weight_gradient_(_matrix(torch.float32), _matrix(torch.bfloat16), _matrix(torch.bfloat16))
    assert asked == [torch.float32]


KERNEL_CHOICES = ("request_for", "_refuses_triton", "_refuses_cluster", "_main")


@check(*(f"kernels/choose_kernel.py::{name}" for name in KERNEL_CHOICES))
def _a_gpu_takes_triton(gpu: Gpu) -> None:
    wide, narrow = (
        choose_kernel.request_for(GPU, dtype=dtype, columns=4096, options=PolicyLossOptions())
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (wide.device, wide.capability) == ("cuda", (9, 0))
    assert choose_kernel.choose(wide).name == "triton"
    refusal = choose_kernel.refuses("cuda_cluster", narrow)
    assert refusal is None or "it is not built" in refusal
