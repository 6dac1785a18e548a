"""Servers that a stage starts itself, because torchrun or srun has started its ranks: they have GPUs of their own, or
the stage says before anything is started why it cannot give them any."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_r1reward.cluster import placement
from megatron_r1reward.cluster.placement import ServerKind, Stage, place_beside_ranks
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch import server_main, stage_servers
from megatron_r1reward.network.tokens import TOKEN_VARIABLE
from megatron_r1reward.rollout import open_pool
from megatron_r1reward.servers.process import VllmServer


class _AllAreKnownError(Exception):
    """Instead of a start."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[VllmServer]:
    """Every server that would be started, in order."""
    servers: list[VllmServer] = []

    def start_all(some: Sequence[VllmServer], report: object) -> None:
        servers.extend(some)
        raise _AllAreKnownError

    monkeypatch.setattr(VllmServer, "start", lambda server: servers.append(server))
    monkeypatch.setattr(open_pool, "start_servers", start_all)
    monkeypatch.setattr(stage_servers, "start_servers", start_all)
    monkeypatch.setattr(stage_servers, "load_tokenizer", lambda _: None)
    return servers


def on_a_machine(monkeypatch: pytest.MonkeyPatch, gpus: str, ranks: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    for name, value in {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}.items():
        monkeypatch.setenv(name, value)


def config(tmp_path: Path, **sections: dict[str, object]) -> RunConfig:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = {
        "run": {"output_dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path)},
        "data": {"train": "x"},
        "judge": {"model_path": str(tmp_path)},
    }
    return RunConfig.model_validate(base | sections)


def devices(servers: Sequence[VllmServer]) -> list[str]:
    for server in servers:
        server.close()
    return [server._environment["CUDA_VISIBLE_DEVICES"] for server in servers]


@pytest.mark.parametrize("ranks", [1, 2])
def test_rl_under_torchrun_puts_servers_beside_its_ranks(
    ranks: int, started: list[VllmServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of them were on the first GPU, the trainer's. The names are those that the launcher shows."""
    on_a_machine(monkeypatch, "4,5,6,7,8", ranks)
    settings = config(tmp_path, rollout={"count": 2})
    with pytest.raises(_AllAreKnownError), stage_servers.open_rl_services(settings):
        pass
    used = devices(started)
    assert len(used) == 3
    assert len(set(used)) == 3, used
    assert set(used) <= set(["4", "5", "6", "7", "8"][ranks:]), used


def test_a_machine_that_is_too_small_is_refused_before_anything_starts(
    started: list[VllmServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_a_machine(monkeypatch, "0", 1)
    for sections in ({}, {"rollout": {"tensor_parallel_size": 2}}):
        with (
            pytest.raises(ValueError, match=r"servers on this machine, beside the ranks.*rollout\.urls"),
            stage_servers.open_rl_services(config(tmp_path, reward={"use_judge": False}, **sections)),
        ):
            pass
    assert not started


def test_other_stages_share_the_machine_out_too(
    started: list[VllmServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_a_machine(monkeypatch, "0,1,2", 1)
    with (
        pytest.raises(_AllAreKnownError),
        stage_servers.open_evaluation_pool(config(tmp_path, rollout={"count": 3})),
    ):
        pass
    assert devices(started) == ["0", "1", "2"]
    started.clear()
    on_a_machine(monkeypatch, "3,4", 1)
    with pytest.raises(_AllAreKnownError), stage_servers.open_annotator(config(tmp_path)):
        pass
    assert devices(started) == ["3"]


def test_named_gpus_and_colocated_servers_stay_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_a_machine(monkeypatch, "0,1", 2)
    shared = config(tmp_path, reward={"use_judge": False}, rollout={"gpu_ids": [1]})
    assert place_beside_ranks(shared, "rl") == {("rollout", 0): (1,)}
    colocated = config(tmp_path, reward={"use_judge": False}, cluster={"layout": "colocated"}, rollout={"count": 2})
    assert place_beside_ranks(colocated, "rl") == {("rollout", 0): (0,), ("rollout", 1): (1,)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert place_beside_ranks(shared, "rl") == {}
    assert placement.this_machine().groups[0][0].name == socket.gethostname()


def calls(servers: Sequence[VllmServer]) -> list[tuple[list[str], dict[str, str]]]:
    """Command lines without the port, environments without the token."""
    found = []
    for server in servers:
        server.close()
        command = list(server._command)
        command[command.index("--port") + 1] = "0"
        found.append((command, server._environment | {TOKEN_VARIABLE: ""}))
    return found


@pytest.mark.parametrize("stage", ["rl", "eval", "annotate"])
@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"count": 2, "num_threads": 2}, "judge": {"count": 2, "model": "large"}},
        {
            "cluster": {"layout": "colocated"},
            "sampling": {"temperature": 0.7},
            "evaluation": {"data": "held/out.jsonl"},
        },
        {
            "asynchrony": {"mode": "in_flight"},
            "algorithm": {"truncated_importance_sampling": 2.0},
            "rollout": {"tensor_parallel_size": 2, "weight_transport": "gloo"},
            "data": {"train": "x", "image_root": "images", "max_pixels": 4704},
            "annotate": {"model": "teacher"},
        },
    ],
)
def test_a_server_is_called_alike_by_a_job_step_and_by_the_stage_itself(
    stage: Stage,
    sections: dict[str, dict[str, object]],
    started: list[VllmServer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    base = {"judge": {"model_path": str(tmp_path)}}
    settings = config(tmp_path, **sections | {"judge": base["judge"] | sections.get("judge", {})})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(server_main, "node_address", lambda: "127.0.0.1")
    opened = {"rl": stage_servers.open_rl_services, "eval": stage_servers.open_evaluation_pool}
    with pytest.raises(_AllAreKnownError), opened.get(stage, stage_servers.open_annotator)(settings):
        pass
    kinds: list[ServerKind] = ["judge"] * (settings.judge.count if stage == "rl" else 0)
    kinds += ["rollout"] * (1 if stage == "annotate" else settings.rollout.count)
    index = {"judge": 0, "rollout": 0}
    steps = []
    for kind in kinds:
        steps.append(server_main._server(settings, stage, kind, index[kind], tmp_path / "log", 0))
        index[kind] += 1
    assert calls(started) == calls(steps)
