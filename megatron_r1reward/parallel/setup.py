"""Process groups of one trainer rank, from torchrun, Slurm or a single process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_r1reward.cluster.step_environment import rank_of
from megatron_r1reward.config.schema import ParallelSection
from megatron_r1reward.parallel import cpu
from megatron_r1reward.parallel.apex import check_apex
from megatron_r1reward.parallel.precision import set_deterministic
from megatron_r1reward.parallel.rendezvous import Rendezvous


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
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
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
        device=torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu"),
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
    )


def shutdown() -> None:
    """Destroy the process groups; safe to call when there are none."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
