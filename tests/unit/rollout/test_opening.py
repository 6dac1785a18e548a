"""Configuration to servers and transports; the state of servers as a file and a table."""

from __future__ import annotations

import gc
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.rollout.open_pool import build_transport
from megatron_r1reward.servers.build import rollout_server
from megatron_r1reward.servers.command import weight_transport
from megatron_r1reward.servers.keeper import shared_memory_of
from megatron_r1reward.servers.member import Member, write_status
from megatron_r1reward.weight_sync.shared_memory import MemoryFile


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_gpus_are_shared_out(model: Path) -> None:
    section = ServerSection(count=2, tensor_parallel_size=2, gpu_ids=(4, 5, 6, 7))
    options = {"model_path": model, "takes_weights": False, "on_cpu": False}
    servers = [rollout_server(section, index, log_path=model / f"{index}.log", **options) for index in range(2)]
    assert [server._environment["CUDA_VISIBLE_DEVICES"] for server in servers] == ["4,5", "6,7"]
    assert len({server.token for server in servers}) == 2
    for server in servers:
        server.close()
    with pytest.raises(ValueError, match=r"names 4 GPUs, but 3 servers with tensor_parallel_size 2 need 6"):
        rollout_server(section.model_copy(update={"count": 3}), 0, log_path=model / "log", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_transports_of_a_machine_without_a_gpu() -> None:
    assert weight_transport(ServerSection()) == "gloo"
    assert build_transport(ServerSection(weight_transport="ipc")).needs_memory_file
    with pytest.raises(ValueError, match="the trainer sees no GPU: use 'gloo' or 'auto'"):
        build_transport(ServerSection(weight_transport="nccl"))


def test_the_state_of_servers_is_a_table(tmp_path: Path) -> None:
    sick = Member(name="rollout-1", fixed_url="http://b", state="quarantined", restarts=2, last_error="it hangs")
    rows = [Member(name="rollout-0", fixed_url="http://a", state="ready", weight_version=7).status(), sick.status()]
    write_status(tmp_path / "live" / "rollout-servers.json", rows)
    result = CliRunner().invoke(app, ["servers", str(tmp_path)])
    assert result.exit_code == 0
    header, first, second, error = result.output.splitlines()
    assert header.split()[:2] == ["name", "state"]
    assert first.split() == ["rollout-0", "ready", "0", "0", "0", "0", "7", "http://a"]
    assert second.split()[5] == "2"
    assert error == "rollout-1: it hangs"
    assert CliRunner().invoke(app, ["servers", str(tmp_path / "live")]).exit_code == 2


def open_memory() -> list[str]:
    """What this process has open or mapped that lives in memory; whatever other processes do in /dev/shm."""
    names = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [name for name in names if name.startswith(("/dev/shm/", "/memfd:r1reward"))]


def test_weights_in_memory_leave_no_file_and_no_descriptor() -> None:
    gc.collect()  # what earlier tests have left must not go meanwhile
    before = open_memory()
    memory = MemoryFile(1 << 16)
    new = list((Counter(open_memory()) - Counter(before)).elements())
    assert len(new) == 2, "a descriptor and a mapping"
    assert not any(name.startswith("/dev/shm/") for name in new)
    memory.close()
    memory.close()
    del memory
    assert open_memory() == before


def test_shared_memory_of_a_process_group_is_found() -> None:
    from multiprocessing import shared_memory

    block = shared_memory.SharedMemory(create=True, size=4096)
    try:
        assert Path("/dev/shm") / block.name.lstrip("/") in shared_memory_of(os.getpgid(0))
    finally:
        block.close()
        block.unlink()
