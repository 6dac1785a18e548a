"""Devices of each component on the machines that `[plan]` imagines, by the rule that `launch` follows."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1reward.cluster.placement import Node, Site, place, servers_of
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.planner.planned_layout import Stage

_MOST_NODES = 4096
_CORES = 1 << 20  # [plan] says nothing about cores


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
