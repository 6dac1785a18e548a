"""How the trainer of a run is laid out over its ranks, and the devices of each component on the machines that `[plan]`
imagines, by the rule that `launch` follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_r1reward.cluster import legality
from megatron_r1reward.cluster.placement import Node, Site, place, servers_of
from megatron_r1reward.config.schema import ParallelSection, RunConfig
from megatron_r1reward.model_folder.shape import ModelShape

Stage = Literal["sft", "rl"]
Recompute = Literal["none", "selective", "full"]
_MOST_NODES = 4096
_CORES = 1 << 20  # [plan] says nothing about cores


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes of the trainer. `dp` counts replicas of the whole model; gradients and optimizer state are shared
    by `dp` x `cp` ranks, those of experts by what `etp`, `ep` and `pp` leave of the world.

    `chunk_layers`: decoder layers of every pipeline chunk in model order (chunk v * pp + r is chunk v of stage r);
    empty: an equal split.
    """

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
    vision_replicated: bool = False  # image-sharded: every rank holds the tower and encodes some images
    recompute: Recompute = "none"
    recompute_num_layers: int = 1
    recompute_vision: bool = False
    chunk_layers: tuple[int, ...] = ()

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
    def stream_cut(self) -> int:
        """Tensor-parallel ranks over which norms and the residual stream are cut."""
        return self.tp if self.sequence_parallel else 1

    def layers_of(self, stage: int, layers: int) -> list[int]:
        """Indices of the decoder layers of a pipeline stage."""
        counts = self.chunk_layers or (layers // (self.pp * self.vpp),) * (self.pp * self.vpp)
        starts = [sum(counts[:chunk]) for chunk in range(len(counts))]
        chunks = range(stage, len(counts), self.pp)
        return [layer for c in chunks for layer in range(starts[c], starts[c] + counts[c])]

    def chunks_in_flight(self, stage: int, micro_batches: int) -> int:
        """Model chunks (1/vpp of a stage) whose activations are alive at once, at the peak of a stage.

        Plain 1F1B keeps pp - stage micro-batches; the interleaved schedule warms up
        2 (pp - stage - 1) + (vpp - 1) pp chunks and runs one more (megatron-core's `get_pp_rank_microbatches`).
        """
        if self.vpp == 1:
            return min(self.pp - stage, micro_batches)
        return min(2 * (self.pp - stage - 1) + (self.vpp - 1) * self.pp + 1, micro_batches * self.vpp)


def check(shape: ModelShape, section: ParallelSection, world: int) -> str | None:
    """Why the trainer cannot run `section` on `world` ranks, with the nearest legal layout; None when it can."""
    problem = legality.layout_problem(shape, section, world)
    if problem is not None:
        nearest = legality.nearest_layout(shape, section, world)
        return f"{problem}. The nearest legal layout: {legality.describe(nearest)}"
    return legality.expert_problem(shape, section, world)


def trainer_layout(shape: ModelShape, section: ParallelSection, world: int) -> Layout:
    """The layout on `world` ranks; `check` has to accept it first."""
    tp, pp, cp = (
        section.tensor_model_parallel_size,
        section.pipeline_model_parallel_size,
        section.context_parallel_size,
    )
    return Layout(
        tp=tp,
        pp=pp,
        vpp=section.virtual_pipeline_model_parallel_size,
        cp=cp,
        ep=section.expert_model_parallel_size,
        etp=section.expert_tensor_parallel_size,
        dp=world // (tp * pp * cp),
        sequence_parallel=section.sequence_parallel and tp > 1,
        distributed_optimizer=section.use_distributed_optimizer,
        overlap_grad_reduce=section.overlap_grad_reduce,
        overlap_param_gather=section.overlap_param_gather,
        vision_replicated=section.vision == "image_sharded",
        recompute=section.recompute,
        recompute_num_layers=section.recompute_num_layers,
        recompute_vision=section.recompute_vision,
        chunk_layers=tuple(legality.split_layers(shape, section)),
    )


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Devices of each component. Colocated: the rollout servers run on the trainer's devices."""

    total: int
    trainer: int
    rollout: int
    judge: int
    colocated: bool


def planned_devices(config: RunConfig, stage: Stage) -> Devices:
    """Devices per component on plan.nodes x plan.gpus_per_node identical nodes.

    Raises:
        ValueError: launch would refuse the stage there; the message is launch's, with the number of nodes that helps.
    """
    plan = config.plan
    try:
        return _devices(config, stage, plan.nodes)
    except ValueError as error:
        enough = enough_nodes(config, stage)
        fix = "more nodes alone do not help" if enough is None else f"plan.nodes = {enough} is enough"
        raise ValueError(
            f"{error} (on plan.nodes {plan.nodes} x plan.gpus_per_node {plan.gpus_per_node}; {fix})"
        ) from None


def _devices(config: RunConfig, stage: Stage, nodes: int) -> Devices:
    size = config.plan.gpus_per_node
    # All nodes are alike here: the groups of a heterogeneous job are one.
    one_group = {"trainer_het_group": 0, "rollout_het_group": 0, "judge_het_group": 0}
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=one_group)})
    site = Site(groups=(tuple(Node(name=f"n{i}", gpus=size, cpus=_CORES) for i in range(nodes)),))
    placements = place(config, stage, site)
    used = {kind: sum(len(p.gpu_ids) for p in placements if p.kind == kind) for kind in ("rollout", "judge")}
    return Devices(
        total=nodes * size,
        trainer=next(p.component.tasks for p in placements if p.kind == "driver"),
        rollout=used["rollout"],
        judge=used["judge"],
        colocated=config.cluster.layout == "colocated" and used["rollout"] > 0,
    )


def enough_nodes(config: RunConfig, stage: Stage) -> int | None:
    """The smallest number of nodes, above that of the run file, on which the stage can be placed."""
    servers = sum(servers_of(config, stage).values())
    first = config.plan.nodes + 1
    for nodes in range(first, min(first + servers + (config.cluster.trainer_nodes or 1), _MOST_NODES)):
        try:
            _devices(config, stage, nodes)
        except ValueError:
            continue
        return nodes
    return None
