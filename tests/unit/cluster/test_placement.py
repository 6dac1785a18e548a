"""Who runs where: disjoint GPUs, nothing that does not fit, and messages that say what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1reward.cluster.placement import Node, Placement, Site, Stage, place
from megatron_r1reward.config.schema import RunConfig


def config(**sections: dict[str, object]) -> RunConfig:
    tree: dict[str, dict[str, object]] = {
        "run": {"output_dir": "out"},
        "model": {"path": "model"},
        "data": {"train": "train.jsonl"},
        "judge": {"model_path": "judge"},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return RunConfig.model_validate(tree)


def site(*groups: int, gpus: int = 8, cpus: int = 64) -> Site:
    numbers = iter(range(1, 100))
    return Site(
        groups=tuple(tuple(Node(name=f"n{next(numbers)}", gpus=gpus, cpus=cpus) for _ in range(n)) for n in groups)
    )


def by_name(placements: tuple[Placement, ...]) -> dict[str, Placement]:
    return {placement.component.name: placement for placement in placements}


def test_sft_takes_everything() -> None:
    (trainer,) = place(config(), "sft", site(2))
    assert trainer.component.nodes == ("n1", "n2")
    assert (trainer.component.tasks, trainer.component.gpus_per_node, trainer.cpus_per_task) == (16, 8, 8)


def test_a_replay_has_no_servers() -> None:
    (trainer,) = place(config(rl={"replay": "record"}), "rl", site(2))
    assert (trainer.component.name, trainer.component.tasks) == ("trainer", 16)


def test_servers_come_first_and_share_the_last_node() -> None:
    placements = place(config(rollout={"count": 3, "tensor_parallel_size": 2}), "rl", site(4))
    assert [p.component.name for p in placements] == ["rollout-0", "rollout-1", "rollout-2", "judge-0", "trainer"]
    found = by_name(placements)
    assert found["trainer"].component.nodes == ("n1", "n2", "n3")
    assert found["trainer"].component.tasks == 24
    assert {found[f"rollout-{i}"].component.nodes for i in range(3)} == {("n4",)}
    ids = [gpu for name in ("rollout-0", "rollout-1", "rollout-2", "judge-0") for gpu in found[name].gpu_ids]
    assert ids == list(range(7)), "disjoint"


def test_a_large_judge_gets_a_node_and_rollout_servers_more_than_one() -> None:
    wanted = config(
        rollout={"count": 8, "tensor_parallel_size": 2}, judge={"model_path": "judge", "tensor_parallel_size": 8}
    )
    found = by_name(place(wanted, "rl", site(5)))
    assert found["trainer"].component.nodes == ("n1", "n2")
    assert found["judge-0"].component.nodes == ("n5",)
    assert [found[f"rollout-{i}"].component.nodes[0] for i in range(8)] == ["n3"] * 4 + ["n4"] * 4


def test_one_node_is_shared() -> None:
    found = by_name(place(config(rollout={"count": 2}), "rl", site(1)))
    assert found["trainer"].component.tasks == 5
    assert sorted(gpu for p in found.values() for gpu in p.gpu_ids) == list(range(8))


def test_without_gpus_ranks_come_from_the_run_file() -> None:
    wanted = config(run={"output_dir": "out", "local_ranks": 2}, rollout={"count": 2, "num_threads": 3})
    found = by_name(place(wanted, "rl", site(4, gpus=0, cpus=8)))
    assert (found["trainer"].component.nodes, found["trainer"].component.tasks) == (("n1", "n2", "n3"), 6)
    assert (found["rollout-1"].component.nodes, found["rollout-1"].cpus_per_task) == (("n4",), 3)


def test_colocated_servers_have_the_trainers_gpus() -> None:
    wanted = config(
        cluster={"layout": "colocated"},
        rollout={"count": 8, "tensor_parallel_size": 2},
        reward={"use_judge": False},
    )
    found = by_name(place(wanted, "rl", site(2)))
    assert found["trainer"].component.tasks == 16
    assert found["trainer"].overlap
    assert [found[f"rollout-{i}"].gpu_ids for i in (0, 3, 4)] == [(0, 1), (6, 7), (0, 1)]
    assert [found[f"rollout-{i}"].component.nodes[0] for i in (3, 4)] == ["n1", "n2"]
    assert all(placement.overlap for placement in found.values())


def test_colocated_judge_is_elsewhere() -> None:
    found = by_name(place(config(cluster={"layout": "colocated"}, rollout={"count": 8}), "rl", site(2)))
    assert (found["trainer"].component.nodes, found["judge-0"].component.nodes) == (("n1",), ("n2",))
    assert not found["judge-0"].overlap


def test_sizes_that_do_not_divide_each_other_are_tried_in_both_orders() -> None:
    wanted = config(
        rollout={"count": 6, "tensor_parallel_size": 3},
        judge={"count": 3, "tensor_parallel_size": 4},
        cluster={"ranks_per_node": 1},
    )
    found = by_name(place(wanted, "rl", site(6, gpus=6)))
    assert [found[f"rollout-{i}"].component.nodes[0] for i in range(6)] == ["n2", "n2", "n3", "n3", "n4", "n4"]
    assert [found[f"judge-{i}"].component.nodes[0] for i in range(3)] == ["n6", "n5", "n1"]


def test_the_trainer_has_nodes_enough_for_its_colocated_servers() -> None:
    wanted = config(cluster={"layout": "colocated", "ranks_per_node": 2}, rollout={"count": 3})
    found = by_name(place(wanted, "rl", site(2, gpus=4)))
    assert found["trainer"].component.nodes == ("n1", "n2")
    assert (found["judge-0"].component.nodes, found["judge-0"].gpu_ids) == (("n1",), (2,))


def test_one_gpu_may_be_shared_by_name() -> None:
    named = {"rollout": {"gpu_ids": [0]}, "judge": {"model_path": "judge", "gpu_ids": [0]}}
    found = by_name(place(config(**named), "rl", site(1, gpus=1)))
    assert {name: item.gpu_ids for name, item in found.items()} == dict.fromkeys(found, (0,))
    assert all(item.overlap for item in found.values())
    with pytest.raises(ValueError, match=r"-1 ranks per node, of 1 GPUs.*gpu_ids"):
        place(config(), "rl", site(1, gpus=1))
    with pytest.raises(ValueError, match=r"gpu_ids \[0\] names GPUs of one machine.*2 node"):
        place(config(**named), "rl", site(2))


def test_heterogeneous_groups() -> None:
    wanted = config(cluster={"judge_het_group": 1})
    found = by_name(place(wanted, "rl", site(2, 1)))
    assert (found["judge-0"].component.nodes, found["judge-0"].group) == (("n3",), 1)
    assert found["rollout-0"].component.nodes == ("n2",)
    with pytest.raises(ValueError, match=r"judge_het_group is 1.*1 group"):
        place(wanted, "rl", site(3))


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("eval", ["rollout-0", "rollout-1", "evaluate"]),
        ("annotate", ["rollout-0", "annotate"]),
        ("judge", ["judge-0"]),
    ],
)
def test_other_stages(stage: Stage, names: list[str]) -> None:
    placements = place(config(rollout={"count": 2}), stage, site(1))
    assert [placement.component.name for placement in placements] == names
    assert placements[-1].component.gpus_per_node == (1 if stage == "judge" else 0)


@pytest.mark.parametrize(("stage", "count", "cores"), [("eval", 8, 7), ("annotate", 1, 7)])
def test_servers_on_all_gpus_leave_a_core_for_the_process_that_asks_them(stage: Stage, count: int, cores: int) -> None:
    node = Site(groups=((Node(name="n1", gpus=count, cpus=8 * count),),))
    *servers, asker = place(config(rollout={"count": count}), stage, node)
    assert (len(servers), servers[0].cpus_per_task, asker.cpus_per_task) == (count, cores, 1)


def test_servers_that_are_reached_by_url_are_not_started() -> None:
    urls = {"urls": ["http://a:1"]}
    assert [p.component.name for p in place(config(rollout=urls, judge=urls), "rl", site(1))] == ["trainer"]
    shared = config(rollout=urls, cluster={"shared_judge": Path("runs/judge")})
    assert [p.component.name for p in place(shared, "rl", site(1))] == ["trainer"]


def test_an_evaluation_has_a_judge_where_its_votes_are_filtered() -> None:
    filtered = {"judge_filtered_votes": True}
    names = [p.component.name for p in place(config(evaluation=filtered), "eval", site(1))]
    assert names == ["rollout-0", "judge-0", "evaluate"]
    elsewhere = config(evaluation=filtered, judge={"urls": ["http://a:1"]})
    assert [p.component.name for p in place(elsewhere, "eval", site(1))] == ["rollout-0", "evaluate"]


@pytest.mark.parametrize(
    ("sections", "nodes", "message"),
    [
        ({"rollout": {"tensor_parallel_size": 16}}, 2, r"size is 16, and no node has more than 8 GPUs"),
        ({"cluster": {"trainer_nodes": 2, "ranks_per_node": 7}, "rollout": {"count": 2}}, 2, r"free GPUs for judge"),
        ({"rollout": {"count": 9}, "cluster": {"trainer_nodes": 2}}, 2, r"set cluster.ranks_per_node below"),
        ({"cluster": {"trainer_nodes": 3}}, 2, r"trainer_nodes is 3, but there are 2 nodes"),
        ({"cluster": {"ranks_per_node": 9}}, 2, r"9 ranks per node, of 8 GPUs"),
        ({"cluster": {"cpus_per_rank": 9}}, 1, r"node n1 has 64 cores.*fewer than"),
        ({"rollout": {"count": 8}}, 1, r"-1 ranks per node"),
        ({"judge": {"model_path": None}}, 1, r"set judge.model_path"),
        ({"cluster": {"layout": "colocated"}, "rollout": {"count": 9}}, 2, r"hold 8 rollout servers"),
    ],
)
def test_what_does_not_fit_is_refused(sections: dict[str, dict[str, object]], nodes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(config(**sections), "rl", site(nodes))
