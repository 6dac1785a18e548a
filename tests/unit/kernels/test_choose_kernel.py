"""Which implementation is taken, and the reasons given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_r1reward.kernels import choose_kernel
from megatron_r1reward.kernels.choose_kernel import KernelRequest, choose, refuses
from megatron_r1reward.kernels.policy_loss import cuda_cluster
from megatron_r1reward.kernels.policy_loss.row_kernels import PolicyLossOptions

HOPPER = KernelRequest(
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


def test_whole_row_kernels_leave_log_probs_to_the_others_and_say_so() -> None:
    for name in choose_kernel.WHOLE_ROW:
        choice = choose(replace(HOPPER, options=None), requested=name)
        assert choice.name == "triton"
        assert choice.reason.startswith(f"{name!r} forms the loss of an update only")


def test_a_request_by_name_never_falls_back() -> None:
    assert choose(HOPPER, requested="triton_row").reason == "requested by name"
    with pytest.raises(ValueError, match=r"'triton_row' cannot be used: it needs whole rows"):
        choose(replace(HOPPER, tensor_parallel_size=2), requested="triton_row")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "precision.logits = 'model'"),
        ({"padded": True}, "padded vocabulary"),
        ({"columns": 1001}, "no multiple of 8"),
        ({"columns": 262_144}, "do not fit on a cluster"),
        ({"options": PolicyLossOptions(kl_coefficient=0.1)}, "a KL term"),
        ({"options": PolicyLossOptions(entropy_coefficient=0.1)}, "an entropy bonus"),
        ({"capability": (8, 0)}, "compute capability 9.x"),
        ({"device": "cpu", "capability": None}, "compute capability 9.x"),
        ({"tensor_parallel_size": 4}, "the vocabulary is split over 4 ranks"),
    ],
)
def test_what_the_cluster_kernel_refuses(change: dict[str, object], reason: str) -> None:
    refusal = refuses("cuda_cluster", replace(HOPPER, **change))
    assert refusal is not None
    assert reason in refusal


def test_the_cluster_kernel_asks_to_be_built() -> None:
    refusal = refuses("cuda_cluster", HOPPER)
    if cuda_cluster.path().exists():
        assert refusal is None
    else:
        assert refusal == f"it is not built: {cuda_cluster.HOW_TO_BUILD}"


def test_every_implementation_is_described() -> None:
    assert set(choose_kernel.DESCRIPTIONS) == {*choose_kernel.TABLE["cuda"], *choose_kernel.WHOLE_ROW}
