"""Devices of each component on identical nodes, by the rules of `cluster.placement`: one server never spans nodes, the
trainer has whole nodes where there are several, and on a single node what the servers leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.planner.planned_layout import Stage


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Devices of each component. Colocated: the rollout servers run on the trainer's devices."""

    total: int
    trainer: int
    rollout: int
    judge: int
    colocated: bool


def _fits(nodes: int, size: int, demands: Sequence[int]) -> bool:
    free = [size] * nodes
    for demand in sorted(demands, reverse=True):
        index = next((i for i, left in enumerate(free) if left >= demand), None)
        if index is None:
            return False
        free[index] -= demand
    return True


def server_counts(config: RunConfig, stage: Stage) -> dict[str, int]:
    """Servers that the stage starts itself; those reached by URL are somebody else's."""
    if stage == "sft" or config.rl.replay is not None:
        return {"rollout": 0, "judge": 0}
    shared = bool(config.judge.urls) or config.cluster.shared_judge is not None
    return {
        "rollout": 0 if config.rollout.urls else config.rollout.count,
        "judge": config.judge.count if config.reward.use_judge and not shared else 0,
    }


def place(config: RunConfig, stage: Stage) -> Devices:
    """Devices per component on plan.nodes x plan.gpus_per_node.

    Raises:
        ValueError: the components do not fit there; the message names the numbers and a fix.
    """
    nodes, size, cluster = config.plan.nodes, config.plan.gpus_per_node, config.cluster
    counts = server_counts(config, stage)
    for kind, section in (("rollout", config.rollout), ("judge", config.judge)):
        if counts[kind] and section.tensor_parallel_size > size:
            raise ValueError(
                f"{kind}.tensor_parallel_size {section.tensor_parallel_size} is more than the {size} devices of a node "
                f"(plan.gpus_per_node), and a server never spans nodes: set it to {size} or less"
            )
    rollout = counts["rollout"] * config.rollout.tensor_parallel_size
    judge = counts["judge"] * config.judge.tensor_parallel_size
    colocated = cluster.layout == "colocated" and rollout > 0
    demands = [config.judge.tensor_parallel_size] * counts["judge"]
    if not colocated:
        demands += [config.rollout.tensor_parallel_size] * counts["rollout"]
    trainer = _trainer_devices(config, demands)
    if colocated and rollout > trainer:
        raise ValueError(
            f"{rollout} rollout devices do not fit on the trainer's {trainer} (cluster.layout 'colocated'): set "
            f"rollout.count to {trainer // config.rollout.tensor_parallel_size} or less"
        )
    return Devices(total=nodes * size, trainer=trainer, rollout=rollout, judge=judge, colocated=colocated)


def _trainer_devices(config: RunConfig, demands: Sequence[int]) -> int:
    nodes, size = config.plan.nodes, config.plan.gpus_per_node
    mine = config.cluster.trainer_nodes
    if mine is None:
        mine = next((n for n in range(nodes, 0, -1) if _fits(nodes - n, size, demands)), min(nodes, 1))
    if mine > nodes:
        raise ValueError(f"cluster.trainer_nodes {mine} is more than plan.nodes {nodes}: raise plan.nodes")
    per_node = config.cluster.ranks_per_node
    if per_node is None:
        per_node = size if _fits(nodes - mine, size, demands) else size - sum(demands) if mine == 1 else 0
    left = [size] * (nodes - mine) + [size - per_node] * mine
    if per_node < 1 or per_node > size or sum(demands) > sum(left):
        raise ValueError(
            f"{nodes} node(s) of {size} devices cannot hold the trainer and {sum(demands)} devices of servers "
            f"(count x tensor_parallel_size of [rollout] and [judge]): raise plan.nodes to "
            f"{-(-(sum(demands) + mine * max(per_node, 1)) // size)} or start fewer servers"
        )
    return mine * per_node
