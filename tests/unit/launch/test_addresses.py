"""What the driver takes from the addresses that servers have published."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch.addresses import connected
from megatron_r1reward.run_dir import Address, RunDir


def published(tmp_path: Path, *transports: str | None) -> RunConfig:
    run = RunDir(root=tmp_path)
    run.live.mkdir(parents=True)
    for index, transport in enumerate(transports):
        name = f"rollout-{index}"
        Address(
            component=name, url=f"http://n{index}:1", served_name="policy", host="n", ready_at=0.0,
            weight_transport=transport,
        ).write(run.address(name))  # fmt: skip
    return RunConfig.model_validate(
        {"run": {"output_dir": str(tmp_path)}, "model": {"path": "-"}, "data": {"train": "-"}}
    )


def test_the_trainer_takes_the_transport_that_its_servers_have_resolved(tmp_path: Path) -> None:
    """Whatever GPUs the trainer itself sees."""
    assert connected(published(tmp_path, "nccl", "nccl"), "rl").rollout.weight_transport == "nccl"


def test_servers_that_take_no_weights_leave_it_open(tmp_path: Path) -> None:
    assert connected(published(tmp_path, None), "eval").rollout.weight_transport == "auto"


def test_servers_that_differ_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout-0 nccl, rollout-1 gloo.*Name one that all can take"):
        connected(published(tmp_path, "nccl", "gloo"), "rl")
