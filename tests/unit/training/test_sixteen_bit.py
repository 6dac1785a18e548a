"""16-bit and FP8 parameters: what has to stay exact, and what libraries have to be told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family import MEMBERS, Member

from megatron_r1reward.checkpoint import dist as checkpoint
from megatron_r1reward.checkpoint import weight_exporter
from megatron_r1reward.config.schema import ParallelSection, RunConfig
from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint
from megatron_r1reward.models.base import on_device
from megatron_r1reward.parallel import setup
from megatron_r1reward.training.data_parallel import ddp_config
from megatron_r1reward.training.state import _optimizer_config, build_state


@pytest.fixture(scope="module")
def topology() -> Iterator[setup.Topology]:
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


def config_of(folder: Any, **sections: Any) -> RunConfig:
    base = {"run": {"output_dir": "-"}, "model": {"path": str(folder), "precision": "bf16"}, "data": {"train": "-"}}
    return RunConfig.model_validate(base | sections)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl tied", "qwen3_vl_moe"])
def test_rotary_frequencies_stay_float32(name: str, topology: setup.Topology, tmp_path_factory) -> None:
    """Rounded to bf16 they turn a patch in row 100 by up to 0.2 rad. In the policy and in the reference, which a
    mixture of experts can have, too."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    write_tiny_checkpoint(folder, corpus=["Which digit is shown? 0 1 2 3"] * 4, spec=MEMBERS[name])
    state = build_state(config_of(folder), topology, optimizer_steps=1, with_reference=True)
    exact = Member(folder).build(topology).vision.inverse_frequency
    for model in (state.module, state.reference):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        angles, expected = (100 * frequency.float() for frequency in (model.vision.inverse_frequency, exact))
        torch.testing.assert_close(angles, expected, rtol=0, atol=1e-5)
        assert model.language_model.rotary_pos_emb.inv_freq.dtype == torch.float32


class Quantized(torch.Tensor):
    """An FP8 parameter as Transformer Engine makes them: it says bf16, and every conversion quantizes it again."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.bfloat16, torch.Tensor.copy_) or (
            func is torch.Tensor.to and len(args) > 2 and args[2]
        ):
            raise AssertionError(f"{func.__name__} of an FP8 parameter")
        return super().__torch_function__(func, types, args, kwargs or {})

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor) * 2


def test_fp8_parameters_are_not_converted_on_their_way_to_the_device() -> None:
    module = torch.nn.Linear(2, 2, bias=False)
    module.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16).as_subclass(Quantized))
    assert on_device(module, torch.device("cpu"), torch.bfloat16) is module
    assert isinstance(module.weight, Quantized)


def test_fp8_parameters_are_pushed_and_exported_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_exporter.fp8_utils, "is_float8tensor", lambda t: isinstance(t, Quantized))
    monkeypatch.setattr(weight_exporter.fp8_utils, "is_te_min_version", lambda _: True)
    values = weight_exporter._values(torch.ones(3).as_subclass(Quantized))
    assert type(values) is torch.Tensor
    assert values.tolist() == [2.0, 2.0, 2.0]
    assert weight_exporter._values(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("recipe", "reuses"), [("mxfp8", True), ("blockwise", False)])
def test_mxfp8_parameters_are_gathered_in_the_gradients_buffer(recipe: str, reuses: bool) -> None:
    """megatron-core asserts it late, in its optimizer, for MXFP8 only."""
    fp8 = {"transformer_impl": "transformer_engine", "fp8": "hybrid", "fp8_recipe": recipe, "fp8_param_gather": True}
    config = config_of("-", precision=fp8)
    assert ddp_config(config).reuse_grad_buf_for_mxfp8_param_ag is reuses
    assert _optimizer_config(config, torch.bfloat16).reuse_grad_buf_for_mxfp8_param_ag is reuses


def test_random_states_of_a_gpu_do_not_stop_a_resume_on_a_cpu(caplog, topology: setup.Topology) -> None:
    saved = checkpoint.collect_random_state() | {"cuda": torch.zeros(16, dtype=torch.uint8), "tracker": "a GPU's"}
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING):
        checkpoint._restore_random_state(saved)
    assert "saved on a GPU, resumed on a CPU" in caplog.text
    assert torch.equal(torch.get_rng_state(), saved["torch"]), "what both have is restored"
