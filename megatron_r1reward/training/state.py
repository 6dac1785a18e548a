"""Everything a trainer rank owns, built once: model, optimizer, schedule, packer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from megatron_r1reward.checkpoint.dist import load_weights
from megatron_r1reward.checkpoint.hf_model_io import load_hf_weights
from megatron_r1reward.checkpoint.saver import CheckpointSaver
from megatron_r1reward.checkpoint.weight_exporter import WeightExporter
from megatron_r1reward.config.schema import OptimizerSection, RunConfig
from megatron_r1reward.data.packing import Packer
from megatron_r1reward.data.pixels import ImageProcessor
from megatron_r1reward.kernels.lm_head import HeadOptions
from megatron_r1reward.kernels.policy_loss.row_kernels import PolicyLossOptions
from megatron_r1reward.model_folder.examine import load_tokenizer
from megatron_r1reward.model_folder.prompt_policy import PromptPolicy
from megatron_r1reward.model_folder.shape import load_shape
from megatron_r1reward.model_folder.weight_table import WeightTable, adapt_table
from megatron_r1reward.models.base import chunks_of, join_chunks, on_device
from megatron_r1reward.models.head import configure_heads, with_head
from megatron_r1reward.models.registry import family_of, load_hf_config, shape_of
from megatron_r1reward.parallel.precision import row_multiple, sequence_multiple
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.rollout.banned import banned_token_ids
from megatron_r1reward.training.alarms import steps_kept
from megatron_r1reward.training.data_parallel import (
    check_freezing,
    finalize_gradients,
    freeze,
    gathers_mxfp8,
    wrap_data_parallel,
)

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class TrainState:
    """One rank's training state. `step` counts finished steps of the stage (SFT batches or RL rollout batches)."""

    config: RunConfig
    topology: Topology
    hf_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    packer: Packer
    table: WeightTable
    module: Any  # the bare model of this rank: one chunk, or ModelChunks under the interleaved schedule
    model: Any  # what the schedule runs: DistributedDataParallel, or ModelChunks of them
    optimizer: Any
    scheduler: OptimizerParamScheduler
    exporter: WeightExporter  # of `module`, for pushes and exports
    saver: CheckpointSaver
    data: dict[str, Any] = field(default_factory=dict)  # what decides which rows a step trains on; kept in checkpoints
    models: dict[str, str] = field(default_factory=dict)  # of `models_read`; kept in checkpoints
    parts: dict[str, dict[str, str]] = field(default_factory=dict)  # the user's files, with text; kept in checkpoints
    rollbacks: int = 0  # of this run so far, `training.rollback`; kept in checkpoints
    reference: torch.nn.Module | None = None  # the frozen initial policy, only when the reward holds a KL term
    critic: TrainState | None = None  # trained beside this one, `training.critic`; its steps are this one's
    described: PromptPolicy | None = None  # what the exported folder says about itself; None: it is no reward model
    producer: dict[str, Any] | None = None  # RL: of the checkpoint resumed from, `RolloutProducer.state`
    step: int = 0
    skipped_in_a_row: int = 0  # steps since the last one with a finite gradient

    @property
    def score_layers(self) -> int:
        """Of the scalar head in place of the LM head; 0: there is none."""
        return shape_of(self.hf_config).score_layers


def build_state(
    config: RunConfig,
    topology: Topology,
    *,
    optimizer_steps: int,
    with_reference: bool = False,
    sampled: bool = False,
    score_layers: int = 0,
) -> TrainState:
    """Build the model from `config.model.path` with an optimizer whose schedule spans `optimizer_steps`.

    `with_reference` keeps a frozen second copy of these initial weights. `sampled`: log-probs are those of the
    distribution that rollout servers draw from, and the LM head forms the policy loss (RL). `score_layers`: of a scalar
    head in place of the LM head, drawn from run.seed where the folder has none; 0: the LM head.

    Raises:
        ValueError: the folder is no checkpoint of a supported family, or the layout does not divide the model.
    """
    hf_config = with_head(load_hf_config(config.model.path), score_layers)
    family = family_of(hf_config)
    dtype = DTYPES[config.model.precision]
    check_freezing(config)
    configs = family.build_configs(hf_config, config.parallel, dtype, config.precision, config.moe)
    table = adapt_table(
        family.weight_table(hf_config),
        transformer_impl=config.precision.transformer_impl,
        whole_vision=config.parallel.vision == "image_sharded",
    )

    def load_policy() -> list[torch.nn.Module]:
        chunks = [
            on_device(family.build_model(configs, topology, n), topology.device, dtype)
            for n in range(topology.virtual_pipeline_parallel_size)
        ]
        if config.checkpoint.init_from is not None:
            load_weights(config.checkpoint.init_from, join_chunks(chunks))
        else:
            for chunk in chunks:
                load_hf_weights(chunk, config.model.path, table, seed=config.run.seed)
        loss = PolicyLossOptions.from_config(config.algorithm) if sampled and config.algorithm.fuses_loss else None
        for chunk in chunks:
            configure_heads(chunk, _head_options(config, sampled), device=topology.device, dtype=dtype, loss=loss)
        return chunks

    chunks = load_policy()
    # Before the optimizer and DDP put their functions into the configuration, which layers with experts copy.
    reference = join_chunks(load_policy()).requires_grad_(False) if with_reference else None
    for chunk in chunks:
        freeze(chunk, config.model)
    model = wrap_data_parallel(chunks, configs.language, config)
    optimizer = get_megatron_optimizer(_optimizer_config(config, dtype), chunks_of(model))
    configs.language.finalize_model_grads_func = finalize_gradients
    configs.language.grad_scale_func = optimizer.scale_loss
    tokenizer = load_tokenizer(config.model.path, hf_config)
    return TrainState(
        config=config,
        topology=topology,
        hf_config=hf_config,
        tokenizer=tokenizer,
        packer=build_packer(config, hf_config, tokenizer, topology, last_token_only=score_layers > 0),
        table=table,
        module=join_chunks(chunks),
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optimizer, optimizer_steps),
        exporter=WeightExporter(join_chunks(chunks), table, topology),
        saver=CheckpointSaver(config.run.output_dir / "checkpoints", config.checkpoint, reach=steps_kept(config)),
        reference=reference,
    )


def scalar_head_layers(folder: Path, wanted: int | None, *, key: str, new_head: bool = True) -> int:
    """Layers of the scalar head to train: those that `folder` has, else `wanted`, what the run file's `key` asks for.

    Args:
        new_head: whether the first weights are the folder's, so that a head that it does not have is drawn.

    Raises:
        ValueError: the two differ.
    """
    there = load_shape(folder).score_layers
    if there and wanted is not None and wanted != there:
        raise ValueError(
            f"{key} is {wanted}, but the scalar head in {folder} has {there}: remove the key, or begin with a language "
            "model"
        )
    if there:
        log.info("going on with the scalar head of %s (%d layers)", folder, there)
    elif new_head:
        log.info("%s is a language model: a new scalar head is drawn from run.seed", folder)
    return there or wanted or 1


def build_packer(
    config: RunConfig,
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    topology: Topology,
    *,
    last_token_only: bool = False,
) -> Packer:
    return Packer(
        image_processor=ImageProcessor(
            config.model.path, min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels
        ),
        image_token_id=hf_config.image_token_id,
        positions=family_of(hf_config).positions,
        pad_token_id=tokenizer.pad_token_id,
        token_budget=config.data.token_budget,
        device=topology.device,
        pad_multiple=row_multiple(config.parallel, config.precision),
        sequence_multiple=sequence_multiple(config.parallel),
        share_images=config.group_size > 1,
        last_token_only=last_token_only,
    )


def _head_options(config: RunConfig, sampled: bool) -> HeadOptions:
    """Numerics of the LM head; the contract with the servers stands in docs/numerics.md."""
    tempered = sampled and config.sampling.tempered
    return HeadOptions(
        temperature=config.sampling.temperature if tempered else 1.0,
        excluded_ids=tuple(sorted(banned_token_ids(config.model.path))) if tempered else (),
        logits_dtype=torch.float32 if config.precision.logits == "fp32" else None,
        implementation=config.precision.kernels,
    )


def _optimizer_config(config: RunConfig, dtype: torch.dtype) -> OptimizerConfig:
    section = config.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.lr * section.min_lr_ratio,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        fp8_recipe=config.precision.fp8_recipe if config.precision.fp8 else None,
        reuse_grad_buf_for_mxfp8_param_ag=gathers_mxfp8(config),
    )


def build_scheduler(optimizer: Any, section: OptimizerSection, optimizer_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine to `min_lr_ratio` (or constant), counted in optimizer steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.lr * section.min_lr_ratio,
        lr_warmup_steps=min(int(section.warmup_fraction * optimizer_steps), optimizer_steps - 1),
        lr_decay_steps=optimizer_steps,
        lr_decay_style=section.schedule,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=optimizer_steps,
        wd_incr_style="constant",
    )
