"""Process groups of one trainer rank, from torchrun, Slurm or a single process, and how ranks find each other without a
port that somebody had to choose."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from megatron_r1reward.cluster.step_environment import rank_of
from megatron_r1reward.config.schema import ParallelSection
from megatron_r1reward.parallel import cpu
from megatron_r1reward.parallel.precision import set_deterministic
from megatron_r1reward.run_dir import Record, exists_on_shared

_POLL_INTERVAL_S = 0.1
Value = TypeVar("Value")
Apex = Literal["absent", "nvidia", "unrelated"]
_WAIT_FOR_MAIN = timedelta(days=7)  # servers start, rollouts are sampled; a supervisor watches over the main rank


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where to meet: `path` on a file system that all ranks see; `host`, the name under which others reach this one.
    Rank 0 listens on a port that the kernel picks and publishes it there: jobs that share a node cannot collide.

    The file must belong to this start of the job alone: one that an earlier start left would send ranks to nobody.
    """

    path: Path
    host: str

    def store(self, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
        """The store that `init_process_group` takes; blocks until rank 0 is there.

        Raises:
            ValueError: rank 0 has published nothing within `timeout`.
        """
        if rank == 0:
            store = dist.TCPStore(
                self.host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False
            )  # fmt: skip
            _Address(host=self.host, port=store.port).write(self.path)
            return store
        deadline = time.monotonic() + timeout.total_seconds()
        while not exists_on_shared(self.path):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"rank {rank}: no {self.path} after {timeout}: rank 0 did not start, or the run directory is not "
                    "on a file system that all nodes share"
                )
            time.sleep(_POLL_INTERVAL_S)
        address = _Address.read(self.path)
        assert address is not None
        return dist.TCPStore(address.host, address.port, world_size, is_master=False, timeout=timeout)


@dataclass(frozen=True, kw_only=True)
class _Address(Record):
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this rank stands. `solo` is a process group of this rank alone: the vision tower uses it as its pipeline
    and context group."""

    rank: int
    world_size: int
    device: torch.device
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_parallel_rank: int
    pipeline_parallel_size: int
    data_parallel_rank: int  # context-parallel ranks share one: they work on the same sequences
    data_parallel_size: int
    solo: dist.ProcessGroup
    virtual_pipeline_parallel_size: int = 1
    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    on_host: dist.ProcessGroup | None = None  # all ranks, through their hosts; None with a single rank

    def from_main(self, value: Value) -> Value:
        """The main rank's `value`, any object, on every rank; collective.

        The others wait on their hosts, for as long as it takes: in a collective of the device a kernel would spin until
        the main rank comes, beside servers that share the device, and end with that group's time-out. A main rank that
        dies closes its connections, which ends the wait with an error.
        """
        if self.on_host is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.on_host, device=torch.device("cpu"))
        return box[0]

    def decided_by_main(self, decide: Callable[[], Value]) -> Value:
        """What the main rank finds by `decide`, on every rank; collective.

        Raises:
            OSError, ValueError: those of `decide`, on every rank: the others would wait.
        """
        answer: Value | Exception | None = None
        if self.is_main:
            try:
                answer = decide()
            except (OSError, ValueError) as error:
                answer = error
        answer = self.from_main(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]

    def holds_first_layer(self, chunk: int) -> bool:
        """Whether model chunk `chunk` of this rank embeds tokens and images."""
        return self.is_first_stage and chunk == 0

    def holds_last_layer(self, chunk: int) -> bool:
        """Whether model chunk `chunk` of this rank ends with log-probs."""
        return self.is_last_stage and chunk == self.virtual_pipeline_parallel_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank's statistics count: one rank per data-parallel replica, on the last stage."""
        return self.is_last_stage and self.tensor_parallel_rank == 0 and self.context_parallel_rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_parallel_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1

    @property
    def is_main(self) -> bool:
        """The rank that talks to servers, files of the run and the console."""
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class _Launch:
    rank: int
    world_size: int
    local_rank: int


def _launch_from_environment() -> _Launch:
    """Neither torchrun's variables nor those of an srun: a single process."""
    rank, world_size, local_rank = rank_of(os.environ) or (0, 1, 0)
    return _Launch(rank=rank, world_size=world_size, local_rank=local_rank)


def device_of(local_rank: int = 0) -> torch.device:
    """Where rank `local_rank` of this machine keeps its model: a GPU of its own, where there are any. It is the only
    one that the rank sees where Slurm shows each task its own.

    Raises:
        ValueError: there are fewer GPUs than ranks on this machine.
    """
    if not torch.cuda.is_available():
        return cpu.DEVICE
    visible = torch.cuda.device_count()
    if visible == 1:
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise ValueError(
            f"rank {local_rank} of this machine sees {visible} GPUs: start at most {visible} ranks here, or show every "
            "rank its own (srun --gpus-per-task=1)"
        )
    return torch.device("cuda", local_rank)


def _init_process_group(launch: _Launch, rendezvous: Rendezvous | None, timeout: timedelta) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if rendezvous is not None:
        store = rendezvous.store(launch.rank, launch.world_size, timeout)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(f"{launch.world_size} ranks but {name} is not set: start with torchrun or set it")
    dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout)


def identify_apex() -> Apex:
    """Which `apex` is installed, without importing it: the unrelated one fails or has effects when imported.

    NVIDIA's build serves megatron-core's fused optimizer where Transformer Engine is absent; another project owns the
    name on the package registry, and `pip install apex` installs that one.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        return "nvidia"
    return "unrelated"


def check_apex() -> Apex:
    """The installed kind; ValueError for the unrelated package, because megatron-core would import it by mistake."""
    kind = identify_apex()
    if kind == "unrelated":
        try:
            metadata = importlib.metadata.metadata("apex")
            named = f"{metadata['Name']} {metadata['Version']}: {metadata['Summary']}"
        except importlib.metadata.PackageNotFoundError:
            named = "no package metadata"
        raise ValueError(
            f"the installed package 'apex' ({named}) is not NVIDIA's Apex but an unrelated one of that name. "
            "Uninstall it (pip uninstall apex); Apex itself is optional and is built from NVIDIA's sources"
        )
    return kind


def check_world_size(section: ParallelSection, world_size: int) -> None:
    """ValueError when the world does not hold a whole number of model replicas."""
    model_ranks = (
        section.tensor_model_parallel_size * section.pipeline_model_parallel_size * section.context_parallel_size
    )
    if world_size % model_ranks:
        raise ValueError(
            f"{world_size} ranks cannot hold replicas of tensor_model_parallel_size "
            f"{section.tensor_model_parallel_size} x pipeline_model_parallel_size "
            f"{section.pipeline_model_parallel_size} x context_parallel_size {section.context_parallel_size}: "
            f"start a multiple of {model_ranks} ranks"
        )
    expert_ranks = (
        section.expert_model_parallel_size * section.expert_tensor_parallel_size * section.pipeline_model_parallel_size
    )
    if world_size % expert_ranks:
        raise ValueError(
            f"{world_size} ranks cannot hold experts of expert_model_parallel_size "
            f"{section.expert_model_parallel_size} on {section.pipeline_model_parallel_size} pipeline stages: "
            f"start a multiple of {expert_ranks} ranks"
        )


def initialize(
    section: ParallelSection,
    *,
    seed: int,
    deterministic: bool = False,
    timeout: timedelta = timedelta(minutes=10),
    rendezvous: Rendezvous | None = None,
) -> Topology:
    """Create megatron-core's process groups. Call once per process, before any model is built.

    Args:
        timeout: of the start and of every collective.
        rendezvous: how several ranks meet; None: at MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Raises:
        ValueError: the ranks do not hold whole replicas, or the unrelated `apex` package is installed.
    """
    check_apex()
    if deterministic:
        set_deterministic()
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    launch = _launch_from_environment()
    check_world_size(section, launch.world_size)
    device = device_of(launch.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _init_process_group(launch, rendezvous, timeout)
    virtual = section.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=section.tensor_model_parallel_size,
        pipeline_model_parallel_size=section.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=section.context_parallel_size,
        expert_model_parallel_size=section.expert_model_parallel_size,
        expert_tensor_parallel_size=section.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    rank = dist.get_rank()
    return Topology(
        rank=rank,
        world_size=dist.get_world_size(),
        device=device,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=section.tensor_model_parallel_size,
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_parallel_size=section.pipeline_model_parallel_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        solo=dist.new_group([rank], use_local_synchronization=True),
        virtual_pipeline_parallel_size=virtual,
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=section.context_parallel_size,
        on_host=dist.new_group(backend="gloo", timeout=_WAIT_FOR_MAIN) if launch.world_size > 1 else None,
    )


def shutdown() -> None:
    """Destroy the process groups; safe to call when there are none."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, a CPU tensor, on `device`.

    A plain `.to(device)` waits until the device has done all that was asked of it before. From pinned memory the copy
    takes its place in the stream, and the host goes on.
    """
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
