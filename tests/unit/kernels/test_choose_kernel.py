"""Which implementation is taken, and the reasons given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_r1reward.kernels import choose_kernel, cuda_library
from megatron_r1reward.kernels.choose_kernel import Request, choose, refuses
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions

HOPPER = Request(
    device="cuda",
    dtype=torch.bfloat16,
    columns=151_936,
    padded=False,
    tensor_parallel_size=1,
    options=PolicyLossOptions(),
    capability=(9, 0),
)


def test_defaults_per_device() -> None:
    assert choose(HOPPER).name == "triton"
    choice = choose(replace(HOPPER, device="cpu", capability=None))
    assert choice.name == "torch"
    assert choice.reason == "first for cpu"


def test_the_table_can_be_replaced_and_the_reason_lists_what_was_skipped() -> None:
    table = {"cuda": ("cuda_cluster", "triton_row", "triton")}
    choice = choose(replace(HOPPER, tensor_parallel_size=4), table=table)
    assert choice.name == "triton"
    assert "cuda_cluster: it needs whole rows, and the vocabulary is split over 4 ranks" in choice.reason
    assert "triton_row: it needs whole rows" in choice.reason


def test_a_request_by_name_never_falls_back() -> None:
    assert choose(HOPPER, requested="triton_row").reason == "requested by name"
    with pytest.raises(ValueError, match=r"'triton_row' cannot be used: it needs whole rows"):
        choose(replace(HOPPER, tensor_parallel_size=2), requested="triton_row")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "dtype torch.float32, it handles bfloat16"),
        ({"padded": True}, "padded vocabulary"),
        ({"columns": 1001}, "no multiple of 8"),
        ({"columns": 262_144}, "do not fit on a cluster"),
        ({"options": PolicyLossOptions(kl_coefficient=0.1)}, "a KL term"),
        ({"options": PolicyLossOptions(entropy_coefficient=0.1)}, "an entropy bonus"),
        ({"capability": (8, 0)}, "compute capability 9.x"),
        ({"device": "cpu", "capability": None}, "compute capability 9.x"),
        ({"rows_only": True}, "inside the LM head"),
    ],
)
def test_what_the_cluster_kernel_refuses(change: dict[str, object], reason: str) -> None:
    refusal = refuses("cuda_cluster", replace(HOPPER, **change))
    assert refusal is not None
    assert reason in refusal


def test_the_cluster_kernel_asks_to_be_built() -> None:
    refusal = refuses("cuda_cluster", HOPPER)
    if cuda_library.path().exists():
        assert refusal is None
    else:
        assert refusal == "it is not built: run python -m megatron_r1reward.kernels.build"


def test_every_implementation_is_described() -> None:
    assert set(choose_kernel.DESCRIPTIONS) == {name for names in choose_kernel.TABLE.values() for name in names}
