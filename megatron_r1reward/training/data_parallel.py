"""Which parameters train, and how their gradients come together over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megatron_r1reward.config.schema import ClusterSection, ModelSection, RunConfig
from megatron_r1reward.models.base import chunks_of, join_chunks


def check_freezing(config: RunConfig) -> None:
    """ValueError when a pipeline stage would be left without trainable parameters."""
    stages = config.parallel.pipeline_model_parallel_size
    if config.model.freeze_language and stages > 1:
        raise ValueError(
            f"model.freeze_language with pipeline_model_parallel_size {stages} leaves the later stages nothing to "
            "train: set pipeline_model_parallel_size to 1"
        )


def freeze(chunk: torch.nn.Module, section: ModelSection) -> None:
    """Apply the freeze switches to one model chunk, before gradients get their buffers."""
    vision: Any = chunk.vision
    if vision is not None:
        merger_ids = {id(parameter) for parameter in vision.merger_parameters()}
        for parameter in vision.parameters():
            in_merger = id(parameter) in merger_ids
            if section.freeze_vision or (section.freeze_merger if in_merger else section.freeze_vision_tower):
                parameter.requires_grad_(False)
    if section.freeze_language:
        chunk.language_model.requires_grad_(False)


def gathers_mxfp8(config: RunConfig) -> bool:
    """Parameters in MXFP8 have no buffer of their own to be gathered in: megatron-core has to be told to gather them
    in that of the gradients."""
    section = config.precision
    return section.fp8 is not None and section.fp8_recipe == "mxfp8" and section.fp8_param_gather


def ddp_config(config: RunConfig) -> DistributedDataParallelConfig:
    parallel = config.parallel
    return DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.ddp_bucket_size,
        fp8_param_gather=config.precision.fp8_param_gather,
        reuse_grad_buf_for_mxfp8_param_ag=gathers_mxfp8(config),
    )


def wrap_data_parallel(
    chunks: Sequence[torch.nn.Module], language: TransformerConfig, config: RunConfig
) -> torch.nn.Module:
    """The chunks in megatron-core's DistributedDataParallel, as one module."""
    parallel, ddp = config.parallel, ddp_config(config)
    wrapped = [
        # Only the first chunk's buckets overlap usefully; megatron-core's own trainer makes the same choice.
        DistributedDataParallel(language, ddp, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        language.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return join_chunks(wrapped)


def finalize_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **arguments: Any) -> None:
    """megatron-core's reduction and scaling, and the sum of whole vision gradients over tensor-parallel ranks, each of
    which has seen other images."""
    finalize_model_grads(model, num_tokens, **arguments)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    gradients = [
        parameter.main_grad.data
        for chunk in model
        for parameter in _image_sharded_parameters(chunk)
        if parameter.requires_grad
    ]
    if gradients:
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat, group=group)
        for gradient, total in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(total)


def _image_sharded_parameters(chunk: torch.nn.Module) -> list[Any]:
    module = chunk
    while not hasattr(module, "vision"):
        module = module.module  # type: ignore[assignment]
    vision = module.vision
    return [] if vision is None or not vision.sharding.image_sharded else list(vision.parameters())  # type: ignore


def zero_gradients(model: torch.nn.Module) -> None:
    """Clear the gradient buffers of all chunks."""
    for chunk in chunks_of(model):
        chunk.zero_grad_buffer()  # type: ignore[operator]


def synchronize_parameters(model: torch.nn.Module) -> None:
    """Finish parameter gathers that overlap with the next forward pass: before weights are exported or saved."""
    for chunk in chunks_of(model):
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def make_room_for_servers(cluster: ClusterSection) -> None:
    """Give cached device memory back before colocated servers wake; collective. Nothing happens in the split layout."""
    if cluster.layout != "colocated":
        return
    torch.cuda.empty_cache()  # does nothing without a GPU
    dist.barrier()  # a server wakes on every rank's device
