"""The LM head takes its numerics from the run file, and its kernels from the device that the model runs on."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from megatron_r1reward.kernels.lm_head import HeadOptions
from megatron_r1reward.kernels.policy_loss.row_kernels import PolicyLossOptions
from megatron_r1reward.models.head import ResponseHead, configure_heads


def tied_head(*, ranks: int = 1, sequence_parallel: bool = False) -> ResponseHead:
    """A head without a weight of its own: it lives in the embedding."""
    head = ResponseHead.__new__(ResponseHead)
    torch.nn.Module.__init__(head)
    head.config = SimpleNamespace(sequence_parallel=sequence_parallel)
    head.tp_group = SimpleNamespace(size=lambda: ranks)
    head.output_size_per_partition = 151_936 // ranks
    return head


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda")


def test_a_tied_head_runs_in_the_kernels_of_its_device(hopper: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    head = tied_head()
    with caplog.at_level(logging.INFO):
        configure_heads(head, HeadOptions(), device=hopper, dtype=torch.bfloat16, loss=PolicyLossOptions())
    assert "log-probs run in 'triton' on torch.float32 logits" in caplog.text
    assert "policy loss run in 'triton' on torch.float32 logits" in caplog.text


@pytest.mark.parametrize("name", ["triton_row", "cuda_cluster"])
def test_the_log_says_who_stands_in_for_a_whole_row_kernel(
    name: str, hopper: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megatron_r1reward.kernels.policy_loss.cuda_cluster.path", lambda: SimpleNamespace(exists=lambda: True)
    )
    options = HeadOptions(implementation=name, logits_dtype=None)
    with caplog.at_level(logging.INFO):
        configure_heads(tied_head(), options, device=hopper, dtype=torch.bfloat16, loss=PolicyLossOptions())
    assert (
        f"log-probs run in 'triton' on torch.bfloat16 logits: {name!r} forms the loss of an update only" in caplog.text
    )
    assert f"policy loss run in {name!r} on torch.bfloat16 logits: requested by name" in caplog.text


def test_what_a_named_kernel_cannot_do_ends_the_run_at_its_start(hopper: torch.device) -> None:
    options = HeadOptions(implementation="cuda_cluster")
    with pytest.raises(ValueError, match=r"'cuda_cluster' cannot be used: .*torch.float32 logits.*precision.logits"):
        configure_heads(tied_head(), options, device=hopper, dtype=torch.bfloat16, loss=PolicyLossOptions())
    with pytest.raises(ValueError, match=r"'triton_row' cannot be used: .* split over 2 ranks"):
        configure_heads(
            tied_head(ranks=2),
            HeadOptions(implementation="triton_row"),
            device=hopper,
            dtype=torch.bfloat16,
            loss=PolicyLossOptions(),
        )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_head_reduces_unless_the_gathering_does(sequence_parallel: bool) -> None:
    head = tied_head(sequence_parallel=sequence_parallel)
    configure_heads(head, HeadOptions(temperature=0.7), device=torch.device("cpu"), dtype=torch.float32)
    assert head.options.temperature == 0.7
    assert head.options.reduce_hidden_gradient is not sequence_parallel
