"""`plan` and `launch` place a stage alike, and place it wherever it fits: every small layout, against a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest

from megatron_r1reward.cluster.placement import Node, Placement, Site, place
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.planner.planned_layout import planned_devices

MakeConfig = Callable[..., RunConfig]
KEYS = ("plan.nodes", "plan.gpus_per_node", "rollout.count", "rollout.tensor_parallel_size", "judge.count",
        "judge.tensor_parallel_size", "cluster.layout", "cluster.trainer_nodes", "cluster.ranks_per_node")  # fmt: skip
LAYOUTS = (
    *product((1, 2, 3), (2, 4), (1, 3), (1, 2, 4), (1, 2), (1, 2, 4), ("split", "colocated"),
             (None, 1, 2), (None, 1, 2, 4)),
    *product((2, 6), (6,), (2, 6), (1, 2, 3), (1, 3), (2, 4), ("split", "colocated"), (None, 1, 5), (None, 1, 3)),
)  # fmt: skip


def packs(free: Sequence[int], demands: Sequence[int]) -> bool:
    """Whether servers of these sizes find room in nodes with so many free GPUs, by trying everything."""
    if not demands:
        return True
    first, *rest = demands
    choices = {gpus: index for index, gpus in enumerate(free) if gpus >= first}
    return any(
        packs(sorted([*free[:index], free[index] - first, *free[index + 1 :]]), rest) for index in choices.values()
    )


def possible(nodes: int, gpus: int, count: int, size: int, judges: int, judge: int, layout: str, mine: Any, ranks: Any):
    """Whether any trainer (of the asked shape) leaves room for all servers. Beside more than one trainer node, servers
    have nodes of their own unless the ranks per node are given."""
    for n, r in product([mine] if mine else range(1, nodes + 1), [ranks] if ranks else range(1, gpus + 1)):
        if n > nodes or r > gpus or (ranks is None and n > 1 and r < gpus):
            continue
        demands = [judge] * judges + ([] if layout == "colocated" else [size] * count)
        if layout == "colocated" and n * (r // size) < count:
            continue
        if packs(sorted([gpus] * (nodes - n) + [gpus - r] * n), sorted(demands, reverse=True)):
            return True
    return False


def check_disjoint(placements: Sequence[Placement], gpus: int) -> None:
    taken: set[tuple[str, int]] = set()
    for item in placements:
        if item.kind == "rollout" and item.overlap:
            continue
        spots = {(node, gpu) for node in item.component.nodes for gpu in item.gpu_ids}
        assert len(spots) == len(item.component.nodes) * len(item.gpu_ids)
        assert not spots & taken and all(gpu < gpus for _, gpu in spots)
        taken |= spots


def outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_plan_and_launch_agree_and_nothing_that_fits_is_refused(make_config: MakeConfig) -> None:
    base = make_config("Qwen2.5-VL-7B-Instruct", stage="rl")
    assert len(LAYOUTS) >= 5_000
    accepted = 0
    for layout in LAYOUTS:
        update: dict[str, dict[str, Any]] = {}
        for key, value in zip(KEYS, layout, strict=True):
            section, name = key.split(".")
            update.setdefault(section, {})[name] = value
        config = base.model_copy(
            update={name: getattr(base, name).model_copy(update=values) for name, values in update.items()}
        )
        nodes, gpus = layout[:2]
        site = Site(groups=(tuple(Node(name=f"n{i}", gpus=gpus, cpus=1 << 20) for i in range(nodes)),))
        placements, devices = outcome(lambda: place(config, "rl", site)), outcome(lambda: planned_devices(config, "rl"))  # noqa: B023
        assert isinstance(placements, str) == isinstance(devices, str), (layout, placements, devices)
        if isinstance(placements, str):
            assert devices.startswith(placements), "the same words"
            assert not possible(*layout), (layout, placements)
            continue
        accepted += 1
        assert possible(*layout), layout
        check_disjoint(placements, gpus)
        *servers, trainer = placements
        assert devices.trainer == trainer.component.tasks
        assert len(servers) == layout[2] + layout[4]
        assert all(len(item.component.nodes) == 1 for item in servers), "no server spans nodes"
    assert accepted > 500


def test_a_layout_that_plan_once_accepted_and_launch_refused(make_config: MakeConfig) -> None:
    config = make_config(
        "Qwen2.5-VL-7B-Instruct",
        stage="rl",
        **{"plan.nodes": 2, "plan.gpus_per_node": 4, "cluster.layout": "colocated", "cluster.trainer_nodes": 2,
           "cluster.ranks_per_node": 2, "rollout.tensor_parallel_size": 4, "reward.use_judge": False},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"hold 0 rollout servers.*plan\.nodes 2 x .*more nodes alone do not help"):
        planned_devices(config, "rl")


def test_the_number_of_nodes_that_helps_is_the_smallest(make_config: MakeConfig) -> None:
    keys = {"plan.nodes": 1, "plan.gpus_per_node": 8, "rollout.count": 17}
    config = make_config("Qwen2.5-VL-7B-Instruct", stage="rl", **keys)
    with pytest.raises(ValueError, match=r"plan\.nodes = 3 is enough"):
        planned_devices(config, "rl")
