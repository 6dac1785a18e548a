"""How a run is laid out over devices: parallel sizes of the trainer, and which devices serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1reward.config.schema import RunConfig

Stage = Literal["sft", "rl"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes of the trainer. `dp` counts replicas of the whole model; the optimizer state is sharded over
    `dp` x `cp` ranks, that of experts over what `etp`, `ep` and `pp` leave of the world."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    vision_replicated: bool = False
    recompute: Recompute = "none"

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def shards(self) -> int:
        """Ranks that share gradients and optimizer state of a dense parameter."""
        return self.dp * self.cp

    @property
    def expert_shards(self) -> int:
        return max(self.world // (self.etp * self.ep * self.pp), 1)

    @property
    def sequence_ranks(self) -> int:
        """Ranks over which the residual stream of one sequence is cut."""
        return self.cp * (self.tp if self.sequence_parallel else 1)

    def layers_of(self, stage: int, layers: int) -> list[int]:
        """Decoder layers of a pipeline stage; interleaved stages hold `vpp` chunks each."""
        chunk = layers // (self.pp * self.vpp)
        starts = [(part * self.pp + stage) * chunk for part in range(self.vpp)]
        return [layer for start in starts for layer in range(start, start + chunk)]

    def chunks_in_flight(self, stage: int, micro_batches: int) -> int:
        """Model chunks (1/vpp of a stage) whose activations are alive at once, at the peak of a stage.

        Plain 1F1B keeps pp - stage micro-batches; the interleaved schedule warms up
        2 (pp - stage - 1) + (vpp - 1) pp chunks and runs one more (megatron-core's `get_pp_rank_microbatches`).
        """
        if self.vpp == 1:
            return min(self.pp - stage, micro_batches)
        return min(2 * (self.pp - stage - 1) + (self.vpp - 1) * self.pp + 1, micro_batches * self.vpp)


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Devices of each component. Colocated: the rollout servers run on the trainer's devices."""

    total: int
    trainer: int
    rollout: int
    judge: int
    colocated: bool


def _started(section: Any) -> int:
    return 0 if section.urls else section.count * section.tensor_parallel_size


def place(config: RunConfig, stage: Stage) -> Devices:
    """Devices per component from [cluster], [rollout] and [judge].

    Raises:
        ValueError: the components need more devices than there are.
    """
    cluster = config.cluster
    total = cluster.nodes * cluster.gpus_per_node
    rollout = _started(config.rollout) if stage == "rl" else 0
    judge = _started(config.judge) if stage == "rl" and config.reward.use_judge else 0
    colocated = cluster.placement == "colocated" and rollout > 0
    taken = judge + (0 if colocated else rollout)
    trainer = cluster.trainer_gpus if cluster.trainer_gpus is not None else total - taken
    if trainer <= 0 or trainer + taken > total:
        raise ValueError(
            f"{total} devices (cluster.nodes {cluster.nodes} x cluster.gpus_per_node {cluster.gpus_per_node}) cannot "
            f"hold {max(trainer, 1)} for the trainer, {rollout} for rollout (rollout.count x tensor_parallel_size) and "
            f"{judge} for the judge: give {max(trainer, 1) + taken} devices or fewer servers"
        )
    if colocated and rollout > trainer:
        raise ValueError(
            f"{rollout} rollout devices do not fit on the trainer's {trainer} (cluster.placement 'colocated'): set "
            f"rollout.count to {trainer // config.rollout.tensor_parallel_size} or less"
        )
    return Devices(total=total, trainer=trainer, rollout=rollout, judge=judge, colocated=colocated)


def parallel_sizes(config: RunConfig, world: int) -> Layout:
    """The trainer's layout on `world` devices; `dp` is rounded down where `world` is no multiple (`legality` says so)."""
    section = config.parallel
    tp, pp = section.tensor_model_parallel_size, section.pipeline_model_parallel_size

    def option(name: str, default: Any) -> Any:
        value = getattr(section, name, default)
        return default if value is None else value

    cp = option("context_parallel_size", 1)
    return Layout(
        tp=tp,
        pp=pp,
        vpp=option("virtual_pipeline_model_parallel_size", 1),
        cp=cp,
        ep=option("expert_model_parallel_size", 1),
        etp=option("expert_tensor_parallel_size", 1),
        dp=max(world // (tp * pp * cp), 1),
        sequence_parallel=section.sequence_parallel and tp > 1,
        distributed_optimizer=section.use_distributed_optimizer,
        overlap_grad_reduce=option("overlap_grad_reduce", False),
        overlap_param_gather=option("overlap_param_gather", False),
        recompute=option("recompute", "none"),
    )
