"""Which component runs on which nodes and GPUs: the run file's `[cluster]`, `[rollout]` and `[judge]` sections made
concrete for the nodes that are there. Nothing is started here.

One rule, `place`: `launch` asks it about the nodes of its job, `plan` about those that the run file imagines, and the
driver takes from `servers_of` which servers it has.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_r1reward.cluster.step_environment import local_ranks
from megatron_r1reward.cluster.visible_gpus import count_gpus
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.config.server_sections import VllmSection
from megatron_r1reward.run_dir import Component

Stage = Literal["sft", "rm", "rl", "eval", "annotate", "judge", "serve"]
ServerKind = Literal["rollout", "judge"]
SERVER_KINDS: tuple[ServerKind, ...] = ("rollout", "judge")
# What a stage is about; it ends when this component does. A judge has none: it serves until it is told to stop.
DRIVERS: dict[Stage, str | None] = {
    "sft": "trainer",
    "rm": "trainer",
    "rl": "trainer",
    "eval": "evaluate",
    "annotate": "annotate",
    "judge": None,
    "serve": "serve",  # the service; it, too, serves until it is told to stop
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """What this job may use of one machine."""

    name: str
    gpus: int
    cpus: int


@dataclass(frozen=True, kw_only=True)
class Site:
    """The nodes of this job, by group: one group, except in a heterogeneous job."""

    groups: tuple[tuple[Node, ...], ...]

    def group(self, index: int, what: str) -> tuple[Node, ...]:
        """ValueError when the job has no such group."""
        if index >= len(self.groups):
            raise ValueError(
                f"cluster.{what}_het_group is {index}, but this job has {len(self.groups)} group(s): submit a "
                "heterogeneous job (docs/cluster.md) or set it to 0"
            )
        return self.groups[index]


def this_machine() -> Site:
    """Cores are shared as the operating system sees fit; a layout is not refused for want of them."""
    return Site(groups=((Node(name=socket.gethostname(), gpus=count_gpus(os.environ), cpus=1 << 20),),))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One job step."""

    component: Component
    kind: Literal["driver", "rollout", "judge"]
    index: int = 0  # of its kind
    cpus_per_task: int = 1
    group: int = 0
    overlap: bool = False  # shares its GPUs with other steps on purpose (colocated layout)
    gpu_ids: tuple[int, ...] = ()  # on every one of its nodes, counted among the GPUs of this job


@dataclass
class _Room:
    """What is left of a node while components are placed."""

    node: Node
    group: int
    gpus: list[int] = field(default_factory=list)
    cpus: int = 0
    cores_per_gpu: int = 0  # what a server's GPU comes with; 0 on a node without GPUs

    @classmethod
    def of(cls, node: Node, group: int) -> _Room:
        room = cls(node=node, group=group, gpus=list(range(node.gpus)), cpus=node.cpus)
        room.share_out()
        return room

    def share_out(self) -> None:
        """The cores that are left now, among the node's GPUs."""
        self.cores_per_gpu = max(1, self.cpus // self.node.gpus) if self.node.gpus else 0

    def take(self, gpus: int) -> tuple[int, ...]:
        taken, self.gpus = self.gpus[:gpus], self.gpus[gpus:]
        return tuple(taken)


def asks_judge(config: RunConfig, stage: Stage) -> bool:
    """Whether the stage has questions for a judge, wherever that is."""
    if stage == "rl":
        return config.reward.use_judge and config.rl.replay is None
    return stage == "eval" and config.evaluation.judge_filtered_votes


def servers_of(config: RunConfig, stage: Stage) -> dict[ServerKind, int]:
    """How many servers of each kind the stage starts; servers that are reached by URL are not among them."""
    wanted: dict[ServerKind, int] = {"rollout": 0, "judge": 0}
    if stage == "rl" and config.rl.replay is not None:
        return wanted
    if stage in ("rl", "eval", "serve") and not config.rollout.urls:
        wanted["rollout"] = config.rollout.count
    if stage == "annotate" and config.annotate.url is None:
        wanted["rollout"] = 1
    shared = bool(config.judge.urls) or config.cluster.shared_judge is not None
    if stage == "judge" or (asks_judge(config, stage) and not shared):
        wanted["judge"] = config.judge.count
    if wanted["judge"] and config.judge.model_path is None:
        raise ValueError("this stage starts a judge: set judge.model_path (or judge.urls, or cluster.shared_judge)")
    return wanted


def place(config: RunConfig, stage: Stage, site: Site) -> tuple[Placement, ...]:
    """Every step of the stage, servers first, on disjoint GPUs (except colocated rollout servers).

    Split layout: the trainer has the first nodes of its group; rollout servers fill the others from the front, judges
    from the back, then what the trainer leaves free on its own nodes. One server never spans nodes.
    On a single node `gpu_ids` of a section says which GPUs its servers have, whoever else uses them.

    Raises:
        ValueError: the stage does not fit on these nodes.
    """
    wanted = servers_of(config, stage)
    # Large servers first: a small one must not break up what only a large one needs. The other order is for sizes that
    # do not divide each other (4 and 3 on nodes of 6).
    large_first = sorted(SERVER_KINDS, key=lambda kind: -_section(config, kind).tensor_parallel_size)
    refusals = []
    for order in (large_first, large_first[::-1]):
        try:
            return _place_in_order(config, stage, site, wanted, order)
        except ValueError as error:
            refusals.append(error)
    raise refusals[0]


def _place_in_order(
    config: RunConfig, stage: Stage, site: Site, wanted: Mapping[ServerKind, int], order: Sequence[ServerKind]
) -> tuple[Placement, ...]:
    """`place`: the driver, then servers kind by kind."""
    section = config.cluster
    home = section.trainer_het_group
    groups: dict[ServerKind, int] = {"rollout": section.rollout_het_group, "judge": section.judge_het_group}
    rooms = [[_Room.of(node, index) for node in group] for index, group in enumerate(site.groups)]
    site.group(home, "trainer")
    for kind in SERVER_KINDS:
        if wanted[kind]:
            _check_size(kind, _section(config, kind), site.group(groups[kind], kind))
    placements: list[Placement] = []
    driver = DRIVERS[stage]
    trainer_rooms: list[_Room] = []
    if driver == "trainer":
        beside = {kind: wanted[kind] for kind in wanted if groups[kind] == home}
        trainer, trainer_rooms = _place_trainer(config, rooms[home], beside)
        placements.append(trainer)
    elif driver is not None:
        placements.append(_place_helper(driver, rooms[home][0]))
    for kind in order:
        placements += _place_servers(config, kind, wanted[kind], rooms[groups[kind]], trainer_rooms, placements)
    for room in (room for group in rooms for room in group):
        if room.cpus < 0:
            raise ValueError(
                f"node {room.node.name} has {room.node.cpus} cores in this job, {-room.cpus} fewer than its components "
                "take: ask for more (--cpus-per-task), or lower cluster.cpus_per_rank or cluster.cpus_per_server"
            )
    return tuple(sorted(placements, key=lambda item: ((*SERVER_KINDS, "driver").index(item.kind), item.index)))


def place_beside_ranks(config: RunConfig, stage: Stage) -> Mapping[tuple[ServerKind, int], tuple[int, ...]]:
    """(kind, index) -> GPUs, among those that this process sees, of the servers that it starts itself: by `place`,
    beside the trainer's ranks that torchrun or srun has started on this machine. Nothing where there is no GPU.

    Raises:
        ValueError: the stage does not fit on this machine.
    """
    site = this_machine()
    if not site.groups[0][0].gpus or not any(servers_of(config, stage).values()):
        return {}
    alone = {"trainer_nodes": 1, "ranks_per_node": local_ranks(os.environ)}
    alone |= {"trainer_het_group": 0, "rollout_het_group": 0, "judge_het_group": 0}
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=alone)})
    try:
        placements = place(config, stage, site)
    except ValueError as error:
        raise ValueError(
            f"servers on this machine, beside the ranks that were started on it by others than `r1reward launch`: "
            f"{error}; or name servers that run already in rollout.urls and judge.urls"
        ) from error
    return {(item.kind, item.index): item.gpu_ids for item in placements if item.kind != "driver"}


def _check_size(kind: ServerKind, section: VllmSection, nodes: Sequence[Node]) -> None:
    largest = max(node.gpus for node in nodes)
    if 0 < largest < section.tensor_parallel_size:
        raise ValueError(
            f"{kind}.tensor_parallel_size is {section.tensor_parallel_size}, and no node has more than {largest} GPUs "
            "in this job: one server does not span nodes; ask for more GPUs per node, or lower it"
        )


def _section(config: RunConfig, kind: str) -> VllmSection:
    return config.rollout if kind == "rollout" else config.judge


def _place_trainer(
    config: RunConfig, rooms: Sequence[_Room], beside: dict[ServerKind, int]
) -> tuple[Placement, list[_Room]]:
    """The trainer, and the rooms it is in. `beside`: servers that have to find a place in the same group."""
    section = config.cluster
    colocated = section.layout == "colocated"
    demands = [
        _section(config, kind).tensor_parallel_size
        for kind, count in beside.items()
        for _ in range(count)
        if not (colocated and kind == "rollout") and not _section(config, kind).gpu_ids
    ]
    nodes = section.trainer_nodes or _nodes_left_for_trainer(rooms, demands)
    if colocated and not section.trainer_nodes:
        nodes = _nodes_that_hold(config, rooms, nodes, beside.get("rollout", 0), demands)
    if nodes > len(rooms):
        raise ValueError(f"cluster.trainer_nodes is {nodes}, but there are {len(rooms)} nodes: ask for more (--nodes)")
    mine = list(rooms[:nodes])
    gpus = min(room.node.gpus for room in mine)
    ranks = section.ranks_per_node
    if ranks is None and gpus == 0:
        ranks = config.run.local_ranks
    if ranks is None:
        fits = _fits([room.node.gpus for room in rooms[nodes:]], demands)
        if not fits and nodes > 1:
            raise ValueError(
                f"{sum(demands)} GPUs for servers do not fit on the nodes beside the {nodes} of the trainer: set "
                "cluster.ranks_per_node below the GPUs of a node, lower cluster.trainer_nodes, or ask for more nodes"
            )
        ranks = gpus if fits else _ranks_beside(gpus, [room.node.gpus for room in rooms[nodes:]], demands)
    if ranks < 1 or (gpus and ranks > gpus):
        raise ValueError(
            f"the trainer would have {ranks} ranks per node, of {gpus} GPUs: ask for more GPUs or nodes, or set "
            "cluster.ranks_per_node, rollout.count and judge.count to what fits; gpu_ids of [rollout] and [judge] let "
            "servers share GPUs with the trainer (gpu_memory_utilization)"
        )
    cores = section.cpus_per_rank or (max(1, min(r.node.cpus // r.node.gpus for r in mine)) if gpus else 1)
    ids = [room.take(ranks if gpus else 0) for room in mine]
    for room in mine:
        room.cpus -= cores * ranks
    component = Component(
        name="trainer",
        nodes=tuple(room.node.name for room in mine),
        tasks=nodes * ranks,
        gpus_per_node=len(ids[0]),
    )
    placement = Placement(
        component=component,
        kind="driver",
        cpus_per_task=cores,
        group=mine[0].group,
        overlap=gpus > 0 and (colocated or any(_section(config, kind).gpu_ids for kind in beside if beside[kind])),
        gpu_ids=ids[0],
    )
    return placement, mine


def _nodes_left_for_trainer(rooms: Sequence[_Room], demands: Sequence[int]) -> int:
    """As many nodes as possible such that servers of these sizes fit on the others; all if there is one."""
    count = len(rooms)
    if not demands or count == 1:
        return count
    if all(room.node.gpus == 0 for room in rooms):
        return count - 1
    return next((n for n in range(count - 1, 0, -1) if _fits([r.node.gpus for r in rooms[n:]], demands)), 1)


def _nodes_that_hold(config: RunConfig, rooms: Sequence[_Room], nodes: int, count: int, demands: Sequence[int]) -> int:
    """`nodes`, or as many as `ranks_per_node` needs to hold `count` colocated servers, if the others fit beside it."""
    ranks = config.cluster.ranks_per_node or 0
    slices = ranks // config.rollout.tensor_parallel_size
    needed = -(-count // slices) if slices else nodes
    left = [room.node.gpus - ranks * (place < needed) for place, room in enumerate(rooms)]
    return needed if nodes < needed <= len(rooms) and _fits(left, demands) else nodes


def _ranks_beside(gpus: int, others: list[int], demands: Sequence[int]) -> int:
    """Most ranks on the trainer's only node such that the servers fit there and on the others; below 1: they do not."""
    return next((r for r in range(gpus - 1, 0, -1) if _fits([*others, gpus - r], demands)), gpus - sum(demands))


def _fits(free: list[int], demands: Sequence[int]) -> bool:
    for large_first in (True, False):
        left = list(free)
        for demand in sorted(demands, reverse=large_first):
            index = next((i for i, gpus in enumerate(left) if gpus >= demand), None)
            if index is None:
                break
            left[index] -= demand
        else:
            return True
    return False


def _place_servers(
    config: RunConfig,
    kind: ServerKind,
    count: int,
    rooms: Sequence[_Room],
    trainer_rooms: Sequence[_Room],
    placed: Sequence[Placement],
) -> Iterator[Placement]:
    section = _section(config, kind)
    others = [room for room in rooms if room not in trainer_rooms]
    order = others + [room for room in rooms if room in trainer_rooms]
    if kind == "judge":
        order = others[::-1] + order[len(others) :]
    colocated = config.cluster.layout == "colocated" and kind == "rollout" and trainer_rooms
    for index in range(count):
        size = section.tensor_parallel_size
        if colocated:
            trainer = next(placement for placement in placed if placement.component.name == "trainer")
            room, ids = _beside_ranks(trainer, trainer_rooms, index, size)
        elif section.gpu_ids:
            room, ids = order[0], _named_gpus(kind, section, index, rooms)
        elif all(room.node.gpus == 0 for room in rooms):
            spread = others or list(trainer_rooms)
            room, ids = (spread[index % len(spread)] if kind == "rollout" else spread[-1 - index % len(spread)]), ()
        else:
            room = _first_with(order, size, kind, index, count)
            ids = room.take(size)
        cores = config.cluster.cpus_per_server or room.cores_per_gpu * size or section.num_threads
        shares = bool((colocated or section.gpu_ids) and ids)
        room.cpus -= 0 if shares else cores
        yield Placement(
            component=Component(
                name=f"{kind}-{index}", nodes=(room.node.name,), tasks=1, gpus_per_node=len(ids)
            ),
            kind=kind,
            index=index,
            cpus_per_task=cores,
            group=room.group,
            overlap=shares,
            gpu_ids=ids,
        )  # fmt: skip


def _named_gpus(kind: ServerKind, section: VllmSection, index: int, rooms: Sequence[_Room]) -> tuple[int, ...]:
    size, (room, *others) = section.tensor_parallel_size, rooms
    ids = section.gpu_ids[index * size : (index + 1) * size]
    if others or len(ids) < size or not all(0 <= gpu < room.node.gpus for gpu in ids):
        raise ValueError(
            f"{kind}.gpu_ids {list(section.gpu_ids)} names GPUs of one machine, {size} for each of {section.count} "
            f"servers; here are {len(rooms)} node(s) with {room.node.gpus} GPUs: name {section.count * size} of 0 to "
            f"{room.node.gpus - 1} on a single node, or leave it out"
        )
    return ids


def _beside_ranks(trainer: Placement, rooms: Sequence[_Room], index: int, size: int) -> tuple[_Room, tuple[int, ...]]:
    """Node and GPUs of colocated rollout server `index`: the trainer's GPUs in slices of `size`, node by node."""
    if not trainer.gpu_ids:
        return rooms[index % len(rooms)], ()
    slices = len(trainer.gpu_ids) // size
    if slices == 0 or index >= slices * len(rooms):
        raise ValueError(
            f"colocated: {len(rooms)} nodes x {len(trainer.gpu_ids)} GPUs hold {slices * len(rooms)} rollout servers "
            f"of rollout.tensor_parallel_size {size}: lower rollout.count"
        )
    start = index % slices * size
    return rooms[index // slices], trainer.gpu_ids[start : start + size]


def _first_with(rooms: Sequence[_Room], size: int, kind: str, index: int, count: int) -> _Room:
    for room in rooms:
        if len(room.gpus) >= size:
            return room
    free = {room.node.name: len(room.gpus) for room in rooms}
    raise ValueError(
        f"no node has {size} free GPUs for {kind} server {index} of {count} (free GPUs: {free}; "
        f"{kind}.tensor_parallel_size {size}): ask for more nodes, or lower {kind}.count, "
        f"{kind}.tensor_parallel_size or cluster.trainer_nodes"
    )


def _place_helper(name: str, room: _Room) -> Placement:
    """One core, before servers that have all GPUs take all cores with them."""
    room.cpus -= 1
    room.share_out()
    component = Component(name=name, nodes=(room.node.name,), tasks=1, gpus_per_node=0)
    return Placement(component=component, kind="driver", group=room.group)
