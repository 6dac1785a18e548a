"""FP8 and Transformer Engine: nothing that would be ignored or fail late gets past the configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_r1reward.config.schema import ParallelSection, PrecisionSection
from megatron_r1reward.parallel import precision, specs
from megatron_r1reward.parallel.precision import Device, fp8_arguments, row_multiple, sequence_multiple

H100 = Device(name="H100", capability=(9, 0), transformer_engine=(2, 20))
B200 = Device(name="B200", capability=(10, 0), transformer_engine=(2, 20))
A100 = Device(name="A100", capability=(8, 0), transformer_engine=(2, 20))
SIZES = {"hidden_size": 3584, "intermediate_size per rank": 18944}
FP8 = {"transformer_impl": "transformer_engine", "fp8": "hybrid"}


def arguments(values: dict, device: Device, *, sizes=SIZES, dtype=torch.bfloat16, **parallel) -> dict:
    return fp8_arguments(PrecisionSection(**values), ParallelSection(**parallel), sizes, dtype, device)


@pytest.mark.parametrize(
    ("recipe", "device"), [("delayed", H100), ("tensorwise", H100), ("blockwise", H100), ("mxfp8", B200)]
)
def test_every_recipe_reaches_megatron_core(recipe, device) -> None:
    values = FP8 | {"fp8_recipe": recipe, "fp8_param_gather": True, "fp8_amax_history_len": 32}
    got = arguments(values, device)
    assert (got["fp8"], got["fp8_recipe"], got["fp8_param"]) == ("hybrid", recipe, True)
    assert got["fp8_amax_history_len"] == 32
    assert "first_last_layers_bf16" not in got


def test_deterministic_attention_is_flash_attentions() -> None:
    """Transformer Engine falls back to an attention that knows no packed sequences where it has nothing else."""
    values = {"transformer_impl": "transformer_engine", "deterministic": True}
    assert arguments(values, replace(H100, flash_attention=True))["transformer_impl"] == "transformer_engine"


def test_first_and_last_layers_in_bf16() -> None:
    got = arguments(FP8 | {"first_last_layers_bf16": True, "layers_at_end_in_bf16": 2}, H100)
    assert (got["num_layers_at_start_in_bf16"], got["num_layers_at_end_in_bf16"]) == (1, 2)


@pytest.mark.parametrize(
    ("values", "device", "options", "message"),
    [
        ({"fp8": "hybrid"}, H100, {}, "local layers would ignore it and train in bfloat16"),
        (FP8, H100, {"dtype": torch.float32}, "needs model.precision 'bf16'"),
        (FP8, A100, {}, "needs compute capability 8.9, A100 has 8.0: train in bf16"),
        (FP8 | {"fp8_recipe": "mxfp8"}, H100, {}, "10.0, H100 has 9.0: use one of delayed, tensorwise, blockwise"),
        (
            FP8 | {"fp8_recipe": "blockwise"},
            Device(name="H100", capability=(9, 0), transformer_engine=(2, 2)),
            {},
            "Transformer Engine 2.3 or newer",
        ),
        (FP8 | {"fp8_recipe": "delayed", "first_last_layers_bf16": True}, H100, {}, "does not work with"),
        (FP8 | {"fp8_param_gather": True}, H100, {"use_distributed_optimizer": False}, "use_distributed_optimizer"),
        (FP8, H100, {"sizes": {"intermediate_size per rank": 3420}}, "3420 is not a multiple of 16"),
        (FP8 | {"fp8_recipe": "blockwise"}, H100, {"sizes": {"hidden_size": 2064}}, "multiple of 128"),
        ({"fp8_param_gather": True}, H100, {}, "precision.fp8 is not set"),
        ({"transformer_impl": "transformer_engine", "deterministic": True}, H100, {}, "install flash-attn"),
    ],
)
def test_refusals(values, device, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(values, device, **options)


def test_fp8_on_this_cpu_is_refused(tiny_folder) -> None:
    """megatron-core itself accepts it and trains in full precision."""
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU")
    cpu = precision.this_device()
    assert cpu.capability is None
    with pytest.raises(ValueError, match=r"Transformer Engine is not installed|needs a CUDA device, this is a CPU"):
        arguments(FP8, cpu)
    with pytest.raises(ValueError, match="local layers would ignore it"):
        arguments({"fp8": "e4m3"}, cpu)


def test_the_transformer_engine_spec_fails_at_once_without_it() -> None:
    if precision.this_device().transformer_engine is not None:
        pytest.skip("Transformer Engine is installed")
    from megatron.core.transformer.enums import AttnMaskType

    with pytest.raises(ValueError, match="Transformer Engine cannot be imported"):
        specs.layer_spec(AttnMaskType.causal, transformer_impl="transformer_engine")
    with pytest.raises(ValueError, match="Transformer Engine cannot be imported"):
        specs.final_norm("transformer_engine")


def test_padding_multiples() -> None:
    mxfp8 = PrecisionSection(**FP8, fp8_recipe="mxfp8")
    assert (sequence_multiple(ParallelSection()), row_multiple(ParallelSection(), PrecisionSection())) == (1, 1)
    assert sequence_multiple(ParallelSection(context_parallel_size=4)) == 8
    cut = {"context_parallel_size": 2, "sequence_parallel": True}
    four, two = (ParallelSection(tensor_model_parallel_size=size, **cut) for size in (4, 2))
    assert row_multiple(four, PrecisionSection()) == 8
    assert row_multiple(two, mxfp8) == 128
