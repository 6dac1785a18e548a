"""From the run file's `[precision]` to megatron-core and Transformer Engine: FP8 recipes and their refusals.

megatron-core accepts any FP8 setting without Transformer Engine and then ignores it; nothing here does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from megatron_r1reward.config.schema import ParallelSection, PrecisionSection


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe needs: compute capability of the device, version of Transformer Engine, and the number that every
    size of a matrix product (token count included) has to be a multiple of."""

    capability: tuple[int, int]
    transformer_engine: tuple[int, int]
    multiple: int


RECIPES = {
    "delayed": Recipe(capability=(8, 9), transformer_engine=(1, 0), multiple=16),
    "tensorwise": Recipe(capability=(8, 9), transformer_engine=(2, 2), multiple=16),
    "blockwise": Recipe(capability=(9, 0), transformer_engine=(2, 3), multiple=128),
    "mxfp8": Recipe(capability=(10, 0), transformer_engine=(2, 1), multiple=32),
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """What precision depends on. `capability` is None on a CPU, `transformer_engine` where it is not installed."""

    name: str
    capability: tuple[int, int] | None
    transformer_engine: tuple[int, int] | None
    flash_attention: bool = False


def this_device() -> Device:
    """The device of this process."""
    version = None
    if importlib.util.find_spec("transformer_engine") is not None:
        parts = importlib.metadata.version("transformer_engine").split(".")
        version = int(parts[0]), int(parts[1])
    if not torch.cuda.is_available():
        return Device(name="a CPU", capability=None, transformer_engine=version)
    return Device(
        name=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        transformer_engine=version,
        flash_attention=importlib.util.find_spec("flash_attn") is not None,
    )


def precision_problem(
    section: PrecisionSection, parallel: ParallelSection, sizes: dict[str, int], dtype: torch.dtype, device: Device
) -> str | None:
    """The first reason why the precision cannot be had, with its fix; None when it can.

    Args:
        sizes: per rank, by name: every inner and outer size of the language model's matrix products.
    """
    if section.transformer_impl == "transformer_engine":
        if device.transformer_engine is None:
            return (
                "transformer_impl 'transformer_engine', but Transformer Engine is not installed: "
                "install the 'gpu' extra, or use transformer_impl 'local'"
            )
        if device.capability is None:
            return f"transformer_impl 'transformer_engine' needs a CUDA device, this is {device.name}: use 'local'"
        if section.deterministic and not device.flash_attention:
            return (
                "deterministic with transformer_impl 'transformer_engine': its own attention of packed sequences has "
                "no deterministic backward for every size; install flash-attn, or use transformer_impl 'local'"
            )
    if section.fp8 is None:
        if section.fp8_param_gather or section.first_last_layers_bf16:
            return "fp8_param_gather and first_last_layers_bf16 qualify FP8, but precision.fp8 is not set: set fp8"
        return None
    return _fp8_problem(section, parallel, sizes, dtype, device)


def _fp8_problem(
    section: PrecisionSection, parallel: ParallelSection, sizes: dict[str, int], dtype: torch.dtype, device: Device
) -> str | None:
    recipe = RECIPES[section.fp8_recipe]
    if section.transformer_impl != "transformer_engine":
        return (
            f"fp8 {section.fp8!r} with transformer_impl 'local': local layers would ignore it and train in "
            f"{str(dtype).removeprefix('torch.')}; set transformer_impl to 'transformer_engine'"
        )
    if dtype != torch.bfloat16:
        return f"fp8 needs model.precision 'bf16', not {str(dtype).removeprefix('torch.')}"
    assert device.capability is not None and device.transformer_engine is not None
    if device.capability < recipe.capability:
        legal = [name for name, other in RECIPES.items() if device.capability >= other.capability]
        return (
            f"fp8_recipe {section.fp8_recipe!r} needs compute capability {recipe.capability[0]}.{recipe.capability[1]}"
            f", {device.name} has {device.capability[0]}.{device.capability[1]}: "
            + (f"use one of {', '.join(legal)}" if legal else "train in bf16")
        )
    if device.transformer_engine < recipe.transformer_engine:
        needed = ".".join(map(str, recipe.transformer_engine))
        return f"fp8_recipe {section.fp8_recipe!r} needs Transformer Engine {needed} or newer"
    if section.fp8_recipe == "delayed" and section.first_last_layers_bf16:
        return "first_last_layers_bf16 does not work with fp8_recipe 'delayed': use 'tensorwise' or 'blockwise'"
    if section.fp8_param_gather and not parallel.use_distributed_optimizer:
        return "fp8_param_gather gathers shards of the distributed optimizer: set use_distributed_optimizer to true"
    for name, size in sizes.items():
        if size % recipe.multiple:
            return (
                f"{name} {size} is not a multiple of {recipe.multiple}, which fp8_recipe {section.fp8_recipe!r} "
                "needs: lower tensor_model_parallel_size or train in bf16"
            )
    return None


def fp8_arguments(
    section: PrecisionSection,
    parallel: ParallelSection,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: Device | None = None,
) -> dict[str, Any]:
    """`TransformerConfig` arguments of the layer implementation and of FP8.

    Raises:
        ValueError: with the reason and the fix when the device, the library or the sizes do not allow it.
    """
    problem = precision_problem(section, parallel, sizes, dtype, device or this_device())
    if problem is not None:
        raise ValueError(f"precision: {problem}")
    arguments: dict[str, Any] = dict(transformer_impl=section.transformer_impl)
    if section.fp8 is None:
        return arguments
    arguments |= dict(
        fp8=section.fp8,
        fp8_recipe=section.fp8_recipe,
        fp8_param=section.fp8_param_gather,
        fp8_margin=section.fp8_margin,
        fp8_amax_history_len=section.fp8_amax_history_len,
        fp8_amax_compute_algo=section.fp8_amax_compute_algo,
    )
    if section.first_last_layers_bf16:
        arguments |= dict(
            first_last_layers_bf16=True,
            num_layers_at_start_in_bf16=section.layers_at_start_in_bf16,
            num_layers_at_end_in_bf16=section.layers_at_end_in_bf16,
        )
    return arguments


def token_multiple(section: PrecisionSection) -> int:
    """What the tokens of a rank have to be a multiple of: they are a size of every weight gradient's product."""
    return 1 if section.fp8 is None else RECIPES[section.fp8_recipe].multiple


def sequence_multiple(parallel: ParallelSection) -> int:
    """What every packed sequence is padded to: the 2 x context-parallel chunks of equal length."""
    return 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1


def row_multiple(parallel: ParallelSection, precision: PrecisionSection) -> int:
    """What a packed row is padded to, so that every rank's share of tokens fits sequence parallelism and FP8."""
    per_rank = token_multiple(precision)
    if parallel.sequence_parallel:
        per_rank *= parallel.tensor_model_parallel_size
    return math.lcm(per_rank * parallel.context_parallel_size, sequence_multiple(parallel))


def set_deterministic() -> None:
    """Make this process use deterministic algorithms only. Call before the first CUDA call.

    Transformer Engine, NCCL and cuBLAS read these environment variables; there is no other way to tell them.
    """
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
